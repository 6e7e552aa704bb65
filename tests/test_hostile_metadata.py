"""Hostile configs, Nanotron folders, names, sums and paths: one clear refusal, or the work is done; never anything between."""
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sources import edit_config, edit_text, make_source
from test_hostile import ONE, TWO, in_child, mutated, outside
from trees import ROOT, call, deadline, edit_json, forge, replace

from stream_reshard.cli import main
from stream_reshard.errors import SourceError
from stream_reshard.header import StoredTensor, TensorFile
from stream_reshard.layouts.nanotron_files import parse_pairs, parse_path, parse_shape, parse_weight_file

KEYS = """architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim vocab_size tie_word_embeddings max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    partial_rotary_factor initializer_range hidden_act bos_token_id eos_token_id pad_token_id attention_bias mlp_bias
    sliding_window use_sliding_window max_window_layers layer_types attention_dropout quantization_config
    num_local_experts num_experts qk_norm use_qk_norm qk_layernorm torch_dtype unknown""".split()
VALUES = ["null", "true", "false", "0", "-1", "1", "-0.0", "2.5", "1e999", "-1e999", "1e-320", "NaN", "9" * 4300, "9" * 4301, "[]",
          "{}", '""', '"16"', str(2**47 - 115), str(2**48), r'"\u001b[2J\n\r\u0000"', r'"\ud800"', '"%s"' % ("x" * 10**4),
          r'["\u001b[2J\n"]', r'{"rope_type":"\u001b[2J\n"}', r'{"type":"\ud800","factor":1e999}', '{"rope_theta":{}}',
          "[" * 900 + "]" * 900, '{"a":' * 900 + "0" + "}" * 900, "[%s]" % ",".join(["7"] * 9999), '["LlamaForCausalLM",5]',
          "{%s}" % ",".join(f'"{i}":0' for i in range(2000)), '[["LlamaForCausalLM"]]']
ALLOWED = ["--allow", "rope_scaling", "--allow", "partial_rotary_factor", "--allow", "sliding_window", "--allow", "hidden_act"]


def said(capsys):
    """(stdout, stderr) of a command: not more than a screen, and nothing that a terminal obeys."""
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n")), (out + err)[:2000]
    assert (out + err).count("\n") <= 52 and len(out + err) < 7000, (out + err)[:2000]
    return out, err


@pytest.mark.parametrize("key", KEYS)
def test_value_in_a_config(tmp_path, capsys, key):
    """Whatever stands under a key that is read, it is refused with words, or taken."""
    root, wrong = make_source(tmp_path / "hf"), []
    edit_config(root, {key: "HERE"})
    text = (root / "config.json").read_text()
    for i, value in enumerate(VALUES):
        (root / "config.json").write_text(text.replace('"HERE"', value))
        try:
            with deadline(3):
                code = call("plan", root, "--tp", "2", *(ALLOWED if i % 3 else []))
            assert code == (3 if said(capsys)[1] else 0), code
        except BaseException as error:
            wrong.append(f"{value:.40}: {type(error).__name__} {error!s:.300}")
    assert not wrong, "\n".join(wrong)


def test_many_keys_in_a_config(tmp_path, capsys):
    assert call("plan", make_source(tmp_path / "hf", config={f"k{i}": 0 for i in range(3000)})) == 0
    assert "not understood" in said(capsys)[0]


def accepted(function, *arguments):
    """What the function returns; None where it raises a SourceError, which has a short text. Nothing else is raised."""
    try:
        return function(*arguments)
    except SourceError as error:
        assert str(error).isprintable() and len(str(error)) < 700, f"{error!s:.700}"


def numbers_of(text):
    """A shape as its text says it, with numpy's words taken away."""
    plain = re.sub(r"np\.int64\((\d+)\)", r"\1", text)
    assert re.fullmatch(r"\(\d+(, \d+)*,?\)", plain), text
    return tuple(int(part) for part in plain[1:-1].split(",") if part)


def assert_agrees(text, pairs, shape, unsharded):
    """Slicing arrays by the text, as Nanotron does, and by the boxes gives the same elements; every slice is plain and in
    bounds, both sides match, and the tensor is taken exactly once."""
    arrays = [np.arange(math.prod(extents)).reshape(extents) for extents in (shape, unsharded)]
    seen = np.zeros(shape, int)
    for pair, boxes in zip(text.split(";"), pairs, strict=True):
        sides = [tuple(slice(*(None if n == "None" else int(n) for n in part.split(","))) for part in side.split("|"))
                 for side in pair.split("#")]
        for side, box, array in zip(sides, boxes, arrays, strict=True):
            for s, n in zip(side, array.shape, strict=True):
                assert s.step in (None, 1) and (s.start, s.stop) == (None, None) or 0 <= s.start <= s.stop <= n, text
            assert np.array_equal(array[side], array[tuple(map(slice, box.start, box.stop))]), text
        assert arrays[0][sides[0]].shape == arrays[1][sides[1]].shape, text
        seen[sides[0]] += 1
    assert (seen == 1).all(), text


def path_of(parameter, place):
    """The path under which Nanotron saves a parameter (`get_path`, nanotron/serialize/utils.py)."""
    *folders, suffix = parameter.split(".")
    rank = f"_pp-rank-{place.pp}-of-{place.num_pp}_tp-rank-{place.tp}-of-{place.num_tp}" if place else ""
    return "/".join(["model/model", *folders, f"model_{suffix}{rank}.safetensors"])


ALL = "None,None,None"
PAIRS = [f"{ALL}|{ALL}#0,2,None|{ALL}", f"{ALL}|{ALL}#{ALL}|2,4,None", f"0,1,None|{ALL}#1,2,None|{ALL};1,2,1|{ALL}#3,4,None|{ALL}",
         "0,2,1|0,2,None#0,2,1|0,2,1;0,2,None|2,2,None#0,2,None|4,4,None", f"0,0,None|{ALL}#4,4,None|2,4,None;{ALL}|0,2,1#2,4,1|0,2,None"]
SHAPES = ["(4, 4)", "(4,)", "(np.int64(4), 4)", "(np.int64(4),)", "(1, 2, 3, 4, 5, 6, 7, 8)", "(0, 16)"]
PATHS = [f"model/model/{rest}.safetensors" for rest in ("decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-1-of-2",
         "final_layer_norm/pp_block/model_weight", "lm_head/pp_block/model_bias_pp-rank-1-of-2_tp-rank-0-of-1")]
WORDS = [word.encode("utf-8", "surrogatepass") for word in [
    "None", "0", "1", "2", "4", "-1", "00", "9" * 15, "9" * 16, "9" * 5000, "1e0", "0x1", "1_0", "\u0661", " ", "\n", "\0", "", ",", "|", "#",
    ";", "(", ")", "np.int64(2)", "np.int32(2)", ALL, "0,2,None", "1,2,2", "2,0,None", "0,5,None", "../", "/", ".", "_pp-rank-0-of-1",
    "_tp-rank-2-of-2", ".safetensors", "\x1b[2J", "\ud800", "__import__('os')", "a" * 9999, ";" * 99]]
TWINS = [(b", ", b","), (b"0", b"00"), (b"None", b"1"), (b"/", b"."), (b"4", b"np.int64(4)"), (b"-", b"--"), (b"rank", b"Rank")]


def garbled(rng, text):
    """One text in five as it is, the others with one to three edits."""
    return text if rng.random() < 0.2 else mutated(
        rng, text.encode("utf-8", "surrogateescape"), WORDS, TWINS).decode("utf-8", "surrogateescape")


def test_shapes_and_slices():
    """Of 35,000 texts those that are accepted mean what numpy says they mean."""
    rng, counts = random.Random(11), Counter()
    for _ in range(20_000):
        text, shape = garbled(rng, rng.choice(PAIRS)), rng.choice([(2, 2)] * 6 + [(2, 4), (0, 4), (4,)])
        if (pairs := accepted(parse_pairs, text, shape, (4, 4))) is not None:
            assert_agrees(text, pairs, shape, (4, 4))
            counts["pairs"] += 1
        text = garbled(rng, rng.choice(SHAPES))
        if (shape := accepted(parse_shape, text)) is not None:
            assert shape == numbers_of(text) and 0 < len(shape) <= 8, text
            counts["shapes"] += 1
    assert min(counts.values()) > 1500 and len(counts) == 2, counts


def test_paths():
    """Of 15,000 paths those are accepted that Nanotron writes for the very parameter and rank which they are taken for."""
    rng, taken, wrong = random.Random(12), 0, set()
    for _ in range(15_000):
        text = garbled(rng, rng.choice(PATHS))
        if (told := accepted(parse_path, text)) is not None:
            taken += 1
            inside = told[1] is None or told[1].pp < told[1].num_pp and told[1].tp < told[1].num_tp
            wrong |= {text} if path_of(*told) != text or not inside else set()
    assert taken > 3000 and not wrong, (len(wrong), sorted(wrong)[:10])


def test_weight_files():
    """What a header says is taken together or not at all: 15,000 files with fields garbled, left out, added."""
    rng, taken = random.Random(13), 0
    for _ in range(15_000):
        fields = {"version": "1.5", "unsharded_shape": "(4, 4)", "local_global_slices_pairs": rng.choice(PAIRS)}
        for key in rng.choices([*fields, "x"], k=rng.choice((0, 1, 1, 2))):
            old = fields.pop(key, "")
            fields |= {key: garbled(rng, old)} if rng.random() < 0.8 else {}
        path, shape, keys = rng.choice(PATHS), rng.choice([(2, 2)] * 4 + [(2, 4), (2,), (0, 4), (1,) * 999, ()]), rng.choice(["data"] * 8 + ["x", "xy"])
        tensors = tuple(StoredTensor(path, key, "BF16", shape, 8) for key in (["data"] if keys == "data" else keys))
        told = accepted(parse_weight_file, TensorFile(path, tensors, tuple(fields.items())))
        if told is not None and told.place:
            taken += 1
            assert set(fields) == {"version", "unsharded_shape", "local_global_slices_pairs"} and fields["version"] == told.version
            assert told.unsharded_shape == numbers_of(fields["unsharded_shape"]) and keys == "data"
            if math.prod(told.unsharded_shape) < 10**6:
                assert_agrees(fields["local_global_slices_pairs"], told.pairs, shape, told.unsharded_shape)
    assert 500 < taken < 10_000, taken


def bomb(copy):
    """An anchor of an anchor of an anchor: ten to the eighth words, if somebody prints them."""
    text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))
    (copy / "config.yaml").write_text(text + (copy / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: *a7"))


def twins(copy):
    """Good files beside a damaged one, in folders that no loader of Nanotron looks into."""
    path = copy / "model/model/decoder/0/pp_block/input_layernorm/model_weight.safetensors"
    for folder in ("decoder/0/pp_block.input_layernorm", "decoder/0.pp_block/input_layernorm", "decoder.0/pp_block/input_layernorm",
                   "decoder.0.pp_block/input_layernorm", "decoder/0.pp_block.input_layernorm"):
        (copy / "model/model" / folder).mkdir(parents=True)
        shutil.copy(path, copy / "model/model" / folder)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lists(copy, *paths):
    """The manifest lists more files than there are."""
    forge(copy, lambda value: value["files"].extend({"path": path, "nbytes": 6, "xxh3_128": "0" * 32} for path in paths))


COPIES = [
    ("a pipe among the weights", lambda copy: os.mkfifo(copy / "model/model/model_x.safetensors")),
    *[(f"{name} a pipe", lambda copy, name=name: replace(copy / name, os.mkfifo)) for name in (
        "stream_reshard.json", "config.yaml", "checkpoint_metadata.json", "model_config.json")],
    ("a dangling link", lambda copy: replace(copy / "checkpoint_metadata.json", os.symlink, "nowhere")),
    *[(f"{key} is {value!r:.9}", lambda copy, key=key, value=value: edit_json(copy, "model_config.json", **{key: value})) for key, value in [
        ("num_hidden_layers", 2**47), ("vocab_size", "x" * 10**4), ("vocab_size", 2**47), ("is_\x1b[2J\n_config", True), ("rope_interleaved", "\ud800"),
        ("tie_word_embeddings", "\x1b[2J"), ("rope_scaling", ["\ud800\n"]), ("eos_token_id", 10**4000)]],
    ("lists for a version", lambda copy: edit_json(copy, "checkpoint_metadata.json", version=[], tp={})),
    ("a bomb in config.yaml", bomb), ("an object in config.yaml", lambda copy: edit_text(copy / "config.yaml", " 16", " !!python/name:os.system")),
    ("twins of a damaged file", twins), ("files outside", lambda copy: lists(copy, "../bait", f"{copy.parent}/bait", "/etc/passwd", "model/../../bait"))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A source and its conversion, verified and inspected once, so that children have everything imported."""
    root = make_source(tmp_path_factory.mktemp("pair") / "hf")
    copy = root.with_name("nt")
    assert call(root, copy, "--quiet") == call("verify", root, copy, "--quiet") == call("inspect", copy, "--quiet") == 0
    return root, copy


@pytest.mark.parametrize("keep", [True, False], ids=["manifest", "bare"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in COPIES])
def test_hostile_copy(tmp_path, pair, change, keep):
    """Verify and inspect end soon, with at most a screen of printable words, and open nothing outside the two folders."""
    root, copy = pair[0], Path(shutil.copytree(pair[1], tmp_path / "nt"))
    (tmp_path / "bait").write_text("bait!\n")
    change(copy)
    if not keep:
        (copy / "stream_reshard.json").unlink(missing_ok=True)
    for words in (["inspect", copy], ["verify", root, copy]):
        run = in_child(*words, seconds=3)
        assert run.code in {"inspect": (0, 3), "verify": (5,) if keep or change is twins else (0, 5)}[words[0]], run
        assert outside(run, root, copy) == [] and len(run.out + run.err) < 7000, run
        assert all(line.isprintable() for line in (run.out + run.err).split("\n")), run


FOLDERS = {
    "newline": b"a\nerror: b", "escape": b"\x1b[2J\x1b]0;x\x07", "no UTF-8": b"\xff\xfe\x80", "right to left": "\u202egnp".encode(), "tilde": b"~",
    "space": b"a b  c", "percent": b"100%s%(x)s{0}{x}", "quotes": b"a'b\"c`id`$(id);&|<>*?", "backslash": b"a\\b\\n", "dash": b"-rf", "flag": b"--json",
    "command": b"plan", "carriage return": b"a\rb", "longest DST": b"n" * 232, "yaml": b": #-[]{}!"}


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in FOLDERS.values()], ids=list(FOLDERS))
def test_folder_names(tmp_path, capsys, monkeypatch, name):
    """Folders of any name can be converted; what is said of them is printable, and the last line can be run in a shell."""
    source, destination = make_source(tmp_path / "in" / name), tmp_path / "out" / name
    assert call("plan", source / "absent") == 3 and said(capsys)[1].count("\n") == 1
    assert call(source, destination) == 0 and (destination / "model_config.json").is_file()
    out = said(capsys)[0]
    last = out.splitlines()[-1]
    assert name not in out if not name.isprintable() else str(destination / "config.yaml") in shlex.split(last), last
    assert call("verify", source, destination) == 0 and call("inspect", source) == 0 and said(capsys)
    assert call(source, destination, "--tp", "2") == 4 and said(capsys)[1].count("\n") == 1
    monkeypatch.chdir(source.parent)
    assert main(["plan", "--quiet", "--max-memory", "8GiB", "--", name]) == 0


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in FOLDERS.values()], ids=list(FOLDERS))
def test_names_in_a_source(tmp_path, capsys, name):
    """A tensor and a stray file of any name are told of, escaped."""
    root = make_source(tmp_path / "hf", extra={name.encode("utf-8", "replace").decode(): np.ones(2, np.uint16)})
    (root / f"{name}.safetensors").touch()
    assert call("plan", root) == 3 and "unexpected tensor" in said(capsys)[1]
    os.replace(make_source(tmp_path / "good") / "model.safetensors", root / "model.safetensors")
    assert call("plan", root) == 0 and "no index names" in said(capsys)[0]


@pytest.mark.parametrize("name", ["n" * 233, "n" * 256, "a/" * 2100, "/"], ids=["233", "256", "a long path", "root"])
def test_folders_that_cannot_be(tmp_path, capsys, name):
    """Too long for a name, or no folder to write to: a line or two, and the exit code of the side that it is on."""
    root = make_source(tmp_path / ("s" * 255))
    assert call(root, tmp_path / name, "--quiet") == 4 and said(capsys)[1].count("\n") <= 2
    assert call("plan", tmp_path / name) == 3 and said(capsys)[1].count("\n") <= 2


@pytest.mark.parametrize("num_shards, size, code", [(12, 20_000, 6), (1, 20_000, 6), (1, 29_000, 0)])
def test_a_limit_on_file_sizes(tmp_path, num_shards, size, code):
    """`ulimit -f` is for what is written, not for the shards that are read; what to do next is printable."""
    root = make_source(tmp_path / "hf", config={"intermediate_size": 400, "num_hidden_layers": 1}, num_shards=num_shards)
    run = subprocess.run([sys.executable, "-m", "stream_reshard", root, os.fsencode(tmp_path) + b"/\x1b[31m\n\xff", "--quiet"], cwd=ROOT,
                         capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert run.returncode == code and all(line.isprintable() for line in run.stderr.decode().split("\n")), run


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def plant(root, canary):
    """Everything that some loader would run: pickles, modules, a config that names modules, a template."""
    (root / "random").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "random/rng.pt", "optimizer.pth", "data.pkl", "model.ckpt"):
        (root / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("modeling_x", "configuration_x", "tokenization_x", "setup", "conftest", "sitecustomize", "usercustomize", "torch",
                 "safetensors", "numpy", "xxhash", "psutil", "tqdm", "yaml", "stream_reshard"):
        (root / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    template = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % canary
    (root / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "chat_template": template}))
    (root / "chat_template.jinja").write_text(template)
    edit_config(root, {"auto_map": names, "trust_remote_code": True, "_name_or_path": f"; touch {canary}"})


def test_nothing_of_a_source_is_run(tmp_path):
    """Plan, conversion, verification, inspection, as the installed command starts, with the source as working folder."""
    root, canary, copy = make_source(tmp_path / "hf"), tmp_path / "canary", tmp_path / "nt"
    plant(root, canary)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stream_reshard.cli import script; script()"
    for words in (["plan", "."], [".", copy], ["verify", ".", copy], ["inspect", "."], ["inspect", copy]):
        run = subprocess.run([sys.executable, "-I", "-c", start, *map(str, words)], cwd=root, capture_output=True, text=True)
        assert run.returncode == 0 and not canary.exists(), (words, run.stderr, canary.exists())
    (copy / "stream_reshard.json").unlink()
    shutil.copytree(root / "random", copy / "random")
    runs = [in_child(*words) for words in (["plan", root], [root, tmp_path / "nt2"], ["verify", root, copy], ["inspect", copy])]
    assert [run.code for run in runs] == [0] * 4 and not canary.exists()
    opened = {os.path.splitext(path)[1] for run in runs for path in run.opened if path.startswith((f"{root}/", f"{copy}/"))}
    assert opened <= {".json", ".safetensors", ".yaml", ".jinja", ""}, opened
    pickle.loads((root / "model.pt").read_bytes()).close()
    assert canary.exists(), "the canary cannot sing"


def test_no_module_of_the_working_folder_is_run(tmp_path):
    """`python -m` looks there first; all that it may find is the package itself."""
    root, canary = make_source(tmp_path / "hf"), tmp_path / "canary"
    for name in ("safetensors", "numpy", "xxhash", "psutil", "tqdm", "yaml", "json", "torch", "ctypes"):
        (root / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    run = subprocess.run([sys.executable, "-m", "stream_reshard", ".", tmp_path / "nt", "--quiet"], cwd=root, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0 and not canary.exists(), run.stderr


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


SUMS = [
    ("as sha256sum writes it", "{a}  {ONE}\n{b}  {TWO}\n", 0, []), ("empty", "", 2, ["no sum"]), ("junk", "\0\x1b[2J" * 9999, 2, ["no sum"]),
    ("binary, in a folder, with others", "{Z} *x\n{a} *./{ONE}\n\n# x\n{B}  {TWO}\r\n", 0, []), ("wrong", "{a}  {ONE}\n{Z}  {TWO}\n", 3, ["{TWO}", "{Z}", "{b}"]),
    ("exchanged", "{b}  {ONE}\n{a}  {TWO}\n", 3, ["{ONE}", "{TWO}", "{a}", "{b}"]), ("one missing", "{a}  {ONE}\n", 3, ["{TWO}", "no sum"]),
    ("last digits wrong", "{a}  {ONE}\n{b:.56}{Z:.8}  {TWO}\n", 3, ["{TWO}", "{b}"]),
    ("of other folders", "{a}  x/{ONE}\n{b}  ../{TWO}\n", 2, ["no sum"]), ("twice", "{b}  {TWO}\n{a}  {ONE}\n{Z}  {TWO}\n", 2, ["{TWO}", "two sums"]),
    ("twice, right at last", "{Z}  {TWO}\n{a}  {ONE}\n{b}  {TWO}\n", 2, ["{TWO}", "two sums"])]


@pytest.mark.parametrize("text, code, words", [pytest.param(*row[1:], id=row[0]) for row in SUMS])
def test_sums_in_a_file(tmp_path, capsys, text, code, words):
    root = make_source(tmp_path / "hf", num_shards=2)
    names = {"a": sha(root / ONE), "b": sha(root / TWO), "B": sha(root / TWO).upper(), "Z": "0" * 64, "ONE": ONE, "TWO": TWO}
    (tmp_path / "sums").write_text(text.format(**names))
    assert call(root, tmp_path / "nt", "--quiet", "--source-sha256", tmp_path / "sums") == code
    err = said(capsys)[1]
    assert all(word.format(**names) in err for word in words) and (tmp_path / "nt").exists() == (code == 0), err


@pytest.mark.parametrize("path", ["", ".", "absent", "cache", "/proc/self/mem", "x\x1b[2J\n"], ids=ascii)
def test_sums_that_cannot_be_read(tmp_path, capsys, path):
    assert call("plan", make_source(tmp_path / "hf"), "--source-sha256", path) == 2
    assert "--source-sha256" in (err := said(capsys)[1]) and err.count("\n") == 1


def test_bit_flips_in_a_cache(tmp_path, capsys):
    """A snapshot of links to blobs, as huggingface_hub keeps it: 100 random flips are refused, with file and both sums."""
    root, rng = make_source(tmp_path / "snapshots" / "abc", num_shards=2), random.Random(5)
    (tmp_path / "blobs").mkdir()
    for path in sorted(root.iterdir()):
        name = sha(path) if path.suffix == ".safetensors" else sha(path)[:40]
        path.rename(tmp_path / "blobs" / name)
        path.symlink_to(f"../../blobs/{name}")
    assert call(root, tmp_path / "nt", "--quiet", "--source-sha256", "cache") == 0
    for _ in range(100):
        path = root / rng.choice((ONE, TWO))
        raw = path.read_bytes()
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:])
        assert call("plan", root, "--source-sha256", "cache") == 3, (path.name, at)
        in_data, err = at >= 8 + int.from_bytes(raw[:8], "little"), said(capsys)[1]
        assert all(word in err for word in ([path.resolve().name, sha(path)] if in_data else [path.name])), err
        path.write_bytes(raw)
    assert call("plan", root, "--quiet", "--source-sha256", "cache") == 0


def bind(folder):
    """DST is the source under another name, by a mount, which the test lets go again."""
    (folder / "bound").mkdir()
    if os.geteuid() or subprocess.run(["mount", "--bind", folder / "hf", folder / "bound"], capture_output=True).returncode:
        pytest.skip("only root can mount a folder a second time, and not everywhere")


def move(name):
    """The source stands somewhere else."""
    def moved(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "hf").rename(folder / name)
    return moved


REPLACED = ".nt.0123456789ab.replaced"
PATHS_TO = [
    ("same", "hf", "hf", None), ("slash", "hf", "hf/", None), ("dots", "hf", "hf/../hf", None), ("dot", "hf", "./hf/.", None), ("inside", "hf", "hf/a/b", None),
    ("around", "hf", ".", None), ("above", "hf", "..", None), ("link", "hf", "link", lambda f: (f / "link").symlink_to("hf")),
    ("through a link", "hf", "link/nt", lambda f: (f / "link").symlink_to("hf")), ("a link", "link", "hf/nt", lambda f: (f / "link").symlink_to("hf")),
    ("dangling", "hf", "link", lambda f: (f / "link").symlink_to("hf/nt")), ("bound", "hf", "bound", bind), ("below bound", "hf", "bound/nt", bind),
    ("source bound", "bound", "hf", bind), ("around bound", "bound", "hf/..", bind), ("staging", "nt.partial", "nt", move("nt.partial")),
    ("around, a checkpoint", "nt/hf", "nt", lambda f: (move("nt/hf")(f), shutil.copy(f / "nt/hf/config.json", f / "nt"))),
    ("in staging", "nt.partial/hf", "nt", move("nt.partial/hf")), ("staging linked", "hf", "nt", lambda f: (f / "nt.partial").symlink_to("hf")),
    ("replaced", REPLACED, "nt", move(REPLACED)), ("in replaced", f"{REPLACED}/hf", "nt", move(f"{REPLACED}/hf"))]
"""(remark, SRC, DST, what is done before): a conversion there would write into its own source, or remove it."""


@pytest.mark.parametrize("flags", [[], ["--overwrite", "--restart"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("source, destination, prepare", [pytest.param(*row[1:], id=row[0]) for row in PATHS_TO])
def test_a_source_is_never_written_to(tmp_path, capsys, monkeypatch, source, destination, prepare, flags):
    root = make_source(tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    monkeypatch.chdir(tmp_path)
    try:
        prepare and prepare(tmp_path)
        assert call(source, destination, "--quiet", *flags) == 4 and said(capsys)[1]
        assert {path.name: path.read_bytes() for path in Path(source).iterdir()} == before
    finally:
        (tmp_path / "bound").exists() and subprocess.run(["umount", tmp_path / "bound"], capture_output=True)


def test_hard_links(tmp_path):
    """DST holds the very files of the source: they are replaced there, and stay as they are here."""
    root, other = make_source(tmp_path / "hf"), tmp_path / "nt"
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    other.mkdir()
    for name in before:
        os.link(root / name, other / name)
    assert call(root, other, "--quiet") == 4 and call(root, other, "--quiet", "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before and (other / "model_config.json").is_file()
