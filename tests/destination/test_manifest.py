"""A manifest is read in pieces, holds few bytes per file, and is right or refused."""
import tracemalloc

import pytest

from stream_reshard.destination.manifest import (
    MANIFEST_NAME, FileDone, FileTable, Manifest, open_manifest, read_manifest, with_files)
from stream_reshard.errors import ResourceError, SourceError

FACTS = {"vocab_size": 11, "dtype": "keep", "allowed": []}
FILES = [FileDone("a", 5, "0" * 31 + "1"), FileDone("b/\u00e9\udcff", 2**40, None), FileDone("b/c", 0, "f" * 32)]


def write(root, files, run=None, facts=FACTS):
    (root / MANIFEST_NAME).write_bytes(with_files(Manifest(run or {"identities": {}}, facts), files).packed())


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, FILES)
    stored, whole = open_manifest(tmp_path), read_manifest(tmp_path)
    assert list(stored.entries()) == sorted(FILES, key=lambda file: file.path) == list(whole.files.values())
    assert stored.facts == whole.facts == FACTS and len(stored.files) == 3
    for file in FILES:
        assert stored.files.get(file.path) == file and file.path in stored.files
    assert "c" not in stored.files and stored.files.get("b") is None


def test_no_file_is_named_twice():
    with pytest.raises(ValueError, match="twice"):
        FileTable([FILES[0], *FILES])


def test_a_long_manifest_takes_few_bytes_per_file(tmp_path):
    """Not even a long record of the source is held: it is of no use to a reader."""
    files = [FileDone(f"model/model/decoder/{i}/pp_block/attn/qkv_proj/model_weight.safetensors", i, "a" * 32)
             for i in range(20_000)]
    write(tmp_path, files, {"identities": {file.path: [1, 2, 3, 4, 5] for file in files}})
    tracemalloc.start()
    stored = open_manifest(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60 * len(files) and peak < 200 * len(files) and len(stored.files) == len(files)


def test_a_value_longer_than_the_memory_has_room_for(tmp_path):
    write(tmp_path, FILES, facts=FACTS | {"ignored_tensors": {f"{i:09}": "x" for i in range(30_000)}})
    assert open_manifest(tmp_path)
    with pytest.raises(ResourceError, match="--max-memory"):
        open_manifest(tmp_path, 2**17)
    (tmp_path / MANIFEST_NAME).write_bytes((tmp_path / MANIFEST_NAME).read_bytes()[:-1])
    with pytest.raises(SourceError, match="damaged or edited"):
        open_manifest(tmp_path)


@pytest.mark.parametrize("whole", [0, -4, 4.0, True, "4", [4]])
def test_the_layers_of_the_whole_model_are_a_number(tmp_path, whole):
    write(tmp_path, FILES, facts=FACTS | {"whole_num_hidden_layers": whole})
    for read in (open_manifest, read_manifest):
        with pytest.raises(SourceError, match="is not a number of layers"):
            read(tmp_path)
