"""Verify of a part, `--quick` or `--sample`, reads just that part, and finds what is wrong in it."""
import shutil

import pytest
from damage import bare, edit_header, every, poke
from running import call
from trees import MANIFEST, raw_of

from stream_reshard.machine import memory
from stream_reshard.storage import source_file as tensor_file


def read_by(verify, monkeypatch, *arguments):
    """({(folder, file, offset, nbytes)} that were read, what verify returned)."""
    real, read = tensor_file.SourceFile.read_into, set()

    def noted(self, view, offset):
        read.add((self.root, self.path, offset, len(view)))
        real(self, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.SourceFile, "read_into", noted)
        return read, verify(*arguments)


def test_quick_finds_a_flip_by_the_digest_and_reads_no_weight_of_the_source(made, copied, verify, differs, monkeypatch):
    root = copied("tp2pp2", is_bare=False)
    read, (code, out, _) = read_by(verify, monkeypatch, made("hf"), root, "--quick")
    assert code == 0 and "no weight compared" in out
    assert {row[0] for row in read} == {root} and {row[1] for row in read} > {"config.yaml", "model_config.json"}
    poke(every(root, "o_proj")[0], -1)
    differs(made("hf"), root, ["o_proj", MANIFEST], "--quick")
    bare(root)
    assert verify(made("hf"), root, "--quick")[0] == 0
    edit_header(root, '"BF16"', '"F16"')
    differs(made("hf"), root, ["F16"], "--quick")


def test_a_sample_is_chosen_by_the_seed_and_holds_of_every_parameter(made, copied, verify, monkeypatch):
    """A changed weight in it is found; one outside is not, not even by a digest, but by the whole."""
    monkeypatch.setattr(memory, "MAX_BLOCK_NBYTES", 256)
    source, root = made("hf"), copied("tp2pp2", is_bare=False)
    (bare := shutil.copytree(root, root.with_name("bare")) / MANIFEST).unlink()
    ours, theirs = {}, {}
    for name, copy, part, seed in (("one", root, "10%", 1), ("again", root, "10%", 1), ("other", root, "10%", 2),
                                   ("whole", bare.parent, "100%", 1)):
        read, _ = read_by(verify, monkeypatch, source, copy, "--sample", part, "--seed", seed)
        theirs[name] = {row[2:] for row in read if row[0] == source}
        ours[name] = {row[1:] for row in read if row[0] == copy and row[1].startswith("model/")}
    for rows in (ours, theirs):
        assert rows["one"] == rows["again"] != rows["other"] and rows["one"] | rows["other"] < rows["whole"]
    assert len(theirs["one"]) < len(theirs["whole"]) / 5
    table, begin, _ = raw_of(source / "model.safetensors")
    spans = [entry["data_offsets"] for key, entry in table.items() if key != "__metadata__"]
    assert all(any(first <= row[0] - begin < last for row in theirs["one"]) for first, last in spans)
    for rows, code in ((ours["one"], 5), (ours["whole"] - ours["one"], 0)):
        path, offset, _ = min(rows)
        poke(root / path, offset)
        assert verify(source, root, "--sample", "10%", "--seed", "1")[0] == code and verify(source, root)[0] == 5
        poke(root / path, offset)


@pytest.mark.parametrize("part", [
    "0%", "0", "-5%", "101%", "100.1%", "nan", "inf", "x", "", "5%%", "1e1%", "%", "10 %"])
def test_a_sample_that_is_no_part(made, capsys, part):
    assert call("verify", made("hf"), made("tp1"), f"--sample={part}") == 2
    assert "--sample" in capsys.readouterr().err
