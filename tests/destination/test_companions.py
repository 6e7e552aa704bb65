"""What goes along beside the weights, what stays behind and is said, and what a user is told of tokenizer and dtypes."""
import json
import os
import subprocess
import time

import numpy as np
import pytest
from sources import CONFIG, make_source, make_tensors, shapes_of

from stream_reshard import api
from stream_reshard.cli import main
from stream_reshard.convert import notes
from stream_reshard.destination import companions
from stream_reshard.errors import Refused, SourceError

ALONG = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "qwen.tiktoken", "chat_template.json",
         "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json", "LICENSE",
         "LICENSE.txt", "License.md", "LICENSE-MODEL", "NOTICE", "Notice.txt", "USE_POLICY.md", "README.md", "COPYING"]

BEHIND = ["README", "license.py", "LICENSE.bin", "notices", "pytorch_model.bin", "training_args.bin", "tokenizer",
          "preprocessor_config.json", "modeling_x.py", "tokenization_unnamed.py", "additional_chat_templates/a.txt",
          "other/LICENSE", ".gitattributes", "notebook.ipynb", "vocab.bin"]


def plant(root, *names):
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}" if name.endswith("json") else f"text of {name}")


def planned(source, **choices):
    return api.plan(source, choices.pop("destination", None), max_memory="8GiB", workers=1, **choices)


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "hf")


@pytest.mark.parametrize("to", ["nanotron", "hf"])
def test_files_that_go_along_are_named_and_equal(source, tmp_path, capsys, to):
    """Licences ask for their text, transformers for the rest."""
    plant(source, *ALONG, *BEHIND)
    assert main([str(source), str(tmp_path / "nt"), "--to", to, "--max-memory", "4GiB"]) == 0
    found = {path for path in ALONG + BEHIND if (tmp_path / "nt" / path).exists()}
    assert found == set(ALONG)
    assert all((tmp_path / "nt" / path).read_bytes() == (source / path).read_bytes() for path in ALONG)
    assert planned(source, to=to).facts["copied"] == list(planned(source, to=to).companions)
    listed = " ".join(capsys.readouterr().out.partition("along ")[2].partition("\ndone ")[0].split())
    assert "LICENSE.txt" in listed and f"and {len(ALONG) - 16} more" in listed
    assert main(["verify", str(source), str(tmp_path / "nt"), "--quiet", "--max-memory", "4GiB"]) == 0


def test_a_tokenizer_from_elsewhere_is_not_mixed_with_that_of_the_source(source, tmp_path):
    other = tmp_path / "other"
    plant(source, "tokenizer.json", "vocab.json", "merges.txt", "generation_config.json", "LICENSE", "README.md")
    plant(other, "tokenizer.model", "LICENSE", "README.md")
    companions = planned(source, tokenizer=other).companions
    assert {name: own.path.parent for name, own in companions.items()} == {
        "tokenizer.model": other, "generation_config.json": source, "LICENSE": source, "README.md": source}
    os.remove(other / "tokenizer.model")
    with pytest.raises(Refused, match="holds none of tokenizer.json"):
        planned(source, tokenizer=other)


def test_code_that_the_tokenizer_needs_is_copied_and_said(source):
    """By auto_map, and what that imports from beside it (transformers' get_relative_imports); never more."""
    plant(source, "tokenization_yi.py", "tables.py", "deep.py", "other.py", "modeling_yi.py")
    (source / "tokenization_yi.py").write_text("from .tables import x\nimport numpy\nfrom .gone import y\nraise Exception\n")
    (source / "tables.py").write_text("def f():\n    import .deep\n    from .tokenization_yi import z\n")
    for told in ({"AutoTokenizer": ["tokenization_yi.YiTokenizer", None]}, ["tokenization_yi.YiTokenizer", None],
                 {"AutoTokenizer": "tokenization_yi.YiTokenizer", "AutoModel": "modeling_yi.X"}):
        (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": told}))
        plan = planned(source)
        assert set(plan.companions) == {"tokenizer_config.json", "tokenization_yi.py", "tables.py", "deep.py"}
        notes = "\n".join(plan.notes)
        assert "'tokenization_yi.py' is copied, not run" in notes and "the tokenizer needs 'gone.py'" in notes


@pytest.mark.parametrize("told, words", [
    ("someone/repo--tokenization_x.X", "another repository"), ("../../etc/passwd.X", "no file of the folder"),
    ("/etc/passwd.X", "no file of the folder"), ("tokenization_x.X", "needs 'tokenization_x.py', which is not in"),
    ("a" * 5000 + ".X", "no file of the folder"), (".X", "no file of the folder"), ("", "no file of the folder")])
def test_code_that_cannot_go_along_is_said(source, told, words):
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [told, None]}}))
    plan = planned(source)
    assert set(plan.companions) == {"tokenizer_config.json"} and words in "\n".join(plan.notes)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '{"auto_map": 7}', '{"auto_map": {"AutoTokenizer": {}}}',
                                  '{"auto_map": [[1], 2, null]}', "\0" * 100, '{"auto_map": {"AutoTokenizer": [NaN]}}'],
                         ids=lambda text: ascii(text)[:20])
def test_a_tokenizer_that_makes_no_sense_goes_along_as_it_is(source, text):
    """It is not ours to judge, and nothing is raised."""
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "added_tokens.json"):
        (source / name).write_text(text)
    assert len(planned(source).companions) == 4 and not planned(source).notes


def test_links_within_the_source_and_to_its_own_blobs_need_no_word(tmp_path):
    """As a cache of the hub consists of them."""
    cache = tmp_path / "hub" / "models--a--b"
    snapshot = make_source(cache / "snapshots" / "0123")
    plant(cache, "blobs/b1", "blobs/b2")
    (cache / "blobs" / "b1").write_text("{}")
    os.symlink("../../blobs/b1", snapshot / "tokenizer.json")
    os.symlink(cache / "blobs" / "b2", snapshot / "LICENSE")
    os.symlink("LICENSE", snapshot / "NOTICE")
    plan = planned(snapshot)
    assert len(plan.companions) == 3 and not plan.notes


@pytest.mark.parametrize("flag", [False, True], ids=["SRC", "--tokenizer"])
def test_a_link_out_of_the_source_is_followed_and_said(source, tmp_path, flag):
    folder = tmp_path / "tok" if flag else source
    plant(tmp_path, "elsewhere/t.json")
    folder.mkdir(exist_ok=True)
    os.symlink(tmp_path / "elsewhere" / "t.json", tmp_path / "middle")
    os.symlink("../middle", folder / "tokenizer.json")
    plan = planned(source, tokenizer=folder if flag else None)
    assert [note for note in plan.notes] == [
        f"'tokenizer.json' is a link out of the source: '{tmp_path}/elsewhere/t.json' is copied"]


UNREAL = ["/proc/self/environ", "/proc/self/cmdline", "/proc/version", "/sys/kernel/uevent_seqnum",
          "/proc/self/root/proc/self/environ", "/dev/core", "/dev/fd/../environ"]


@pytest.mark.parametrize("target", [path for path in UNREAL if os.path.isfile(path)])
@pytest.mark.parametrize("flag", [False, True], ids=["SRC", "--tokenizer"])
def test_what_the_kernel_makes_up_is_no_companion(source, tmp_path, capsys, target, flag):
    """The environment of a run may hold keys; a checkpoint is given away."""
    folder = tmp_path / "tok" if flag else source
    folder.mkdir(exist_ok=True)
    os.symlink(target, tmp_path / "middle")
    os.symlink("../middle", folder / "merges.txt")
    words = ["--tokenizer", str(folder)] if flag else []
    assert main([str(source), str(tmp_path / "nt"), "--max-memory", "4GiB", *words]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"error: 'merges.txt' in '{folder}' leads to ") and err.count("\n") == 1
    assert not (tmp_path / "nt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("how", [["-t", "proc", "proc"], ["--bind", "/proc/self/environ"]], ids=["mount", "bind"])
def test_the_kernel_is_known_wherever_it_is_mounted(source, tmp_path, how):
    """By the file system, and not by a name."""
    place = tmp_path / "somewhere" if how[0] == "-t" else source / "vocab.txt"
    place.mkdir() if how[0] == "-t" else place.touch()
    subprocess.run(["mount", *how, place], check=True)
    try:
        if how[0] == "-t":
            os.symlink(place / "1" / "status", source / "vocab.txt")
        with pytest.raises(Refused, match="file system of type proc"):
            planned(source)
    finally:
        subprocess.run(["umount", place], check=True)


def test_what_is_no_file_stays_behind_and_is_said(source, monkeypatch):
    monkeypatch.setattr(companions, "MAX_NBYTES", 1000)
    os.symlink("gone", source / "tokenizer.json")
    os.symlink("merges.txt", source / "merges.txt")
    os.mkfifo(source / "LICENSE")
    (source / "NOTICE").mkdir()
    (source / "vocab.txt").write_text("x" * 1001)
    plan = planned(source)
    assert not plan.companions and len(plan.notes) == 5
    for words in ("a link to 'gone': No such", "a link to 'merges.txt': Too many", "'LICENSE' is not copied: it is not a",
                  "'NOTICE' is not copied", "'vocab.txt' is not copied: it has 1001 B"):
        assert words in "\n".join(plan.notes)


def test_a_crowd_of_companions_stays_bounded(source):
    for number in range(companions.MAX_NUM + 300):
        (source / f"LICENSE-{number:04}").touch()
    plan = planned(source)
    assert len(plan.companions) == companions.MAX_NUM and f"the limit is {companions.MAX_NUM} such files" in "\n".join(plan.notes)


def test_a_companion_that_changes_before_it_is_copied_is_noticed(source, tmp_path):
    plant(source, "tokenizer.json", "other.json")
    plan = planned(source, destination=tmp_path / "nt")
    os.remove(source / "tokenizer.json")
    os.symlink("/proc/self/environ", source / "tokenizer.json")
    with pytest.raises(SourceError, match="tokenizer.json' changed during the run"):
        api.run(plan)
    assert not (tmp_path / "nt").exists()


def ids_note(source, **choices):
    return [note for note in planned(source, **choices).notes if note.startswith("the tokenizer has ids")]


ROWS = CONFIG["vocab_size"]
TABLES = {
    "a vocabulary": ("tokenizer.json", lambda last: {
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(last + 1)}, "merges": ["a b"] * 10}}),
    "added tokens": ("tokenizer.json", lambda last: {"added_tokens": [{"id": last, "content": "<x>"}],
                                                     "truncation": {"max_length": 4096, "stride": 100}}),
    "pieces": ("tokenizer.json", lambda last: {"model": {"type": "Unigram", "vocab": [[f'"{i}', -1.5] for i in range(last + 1)]}}),
    "tokens added apart": ("added_tokens.json", lambda last: {"<x>": last}),
    "a decoder": ("tokenizer_config.json", lambda last: {"added_tokens_decoder": {str(last): {"content": "<x>"}},
                                                         "model_max_length": 10**30}),
    "a plain vocabulary": ("vocab.json", lambda last: {f"t{i}": i for i in range(last + 1)})}


@pytest.mark.parametrize("indent", [None, 2], ids=["dense", "indented"])
@pytest.mark.parametrize("to", ["nanotron", "hf"])
@pytest.mark.parametrize("name, table", TABLES.values(), ids=TABLES)
def test_ids_beyond_the_rows_are_said(source, name, table, to, indent):
    (source / name).write_text(json.dumps(table(ROWS - 1), indent=indent))
    assert ids_note(source, to=to) == []
    (source / name).write_text(json.dumps(table(ROWS + 4), indent=indent))
    note, = ids_note(source, to=to)
    assert f"up to {ROWS + 4} ('{name}'), but the embedding has {ROWS} rows" in note and "last 5 ids" in note


def test_a_large_tokenizer_is_looked_through_at_once(source):
    """128,000 tokens and 280,000 merges; entries that lie across two reads count as well."""
    vocab = {f"token{i}Ġ": i for i in range(128_000)}
    table = {"model": {"type": "BPE", "vocab": vocab, "merges": [f"a{i} b{i}" for i in range(280_000)]}}
    (source / "tokenizer.json").write_text(json.dumps(table, indent=1))
    begin = time.process_time()
    (note, ), seconds = ids_note(source), time.process_time() - begin
    assert "up to 127999" in note and seconds < 1


def test_an_id_that_lies_across_two_reads_counts(source):
    for shift in range(1, 40):
        begin = '{"a": 1, ' + " " * (notes._CHUNK_NBYTES - 9 - shift)
        (source / "vocab.json").write_text(begin + '"some token": 123456789 }')
        copied = {"vocab.json": companions.Companion(source / "vocab.json", [])}
        assert "up to 123456789" in "".join(notes.too_many_ids(copied, 5 * 10**7)), shift


def mixed(tmp_path, words, family="llama", dtype=np.float32):
    tensors = make_tensors(shapes_of(family, CONFIG, False))
    extra = {key: np.ones(array.shape, dtype) for key, array in tensors.items() if any(word in key for word in words)}
    return make_source(tmp_path / "hf", family=family, extra=extra), len(extra)


@pytest.mark.parametrize("words", [["norm"], ["model.norm"], ["lm_head"]], ids=str)
def test_weights_that_nanotron_will_round_are_said(tmp_path, words):
    source, number = mixed(tmp_path, words)
    note, = [note for note in planned(source).notes if "rounds" in note]
    assert note.startswith(f"{number} tensors such as ") and "are F32, config.yaml says bfloat16: Nanotron rounds" in note
    assert not [note for note in planned(source, to="hf").notes if "rounds" in note]


def test_a_router_in_float32_is_as_nanotron_wants_it(tmp_path):
    source, _ = mixed(tmp_path, ["mlp.gate.weight"], "qwen2_moe")
    assert not [note for note in planned(source).notes if "rounds" in note]


@pytest.mark.parametrize("to", ["nanotron", "hf"])
def test_an_adapter_beside_full_weights_is_said(source, to):
    plant(source, "adapter_config.json")
    assert [note for note in planned(source, to=to).notes] == [
        "adapter_config.json: the adapter beside the weights is not merged into them; they are converted without it"]
