"""Hostile indexes and shards are refused in a line; the names in them lead nowhere."""
import json
import os
import socket
from pathlib import Path

import pytest
from damage import replace
from running import call, in_child, outside
from sources import INDEX, ONE, TWO, edit_text, make_source, raw_file

NORM = "model.norm.weight"


def refused(root, *words):
    """The plan of a source is refused with one line that holds these words, and opens nothing but what is in it."""
    run = in_child("plan", root, "--quiet")
    assert (run.code, run.out, outside(run, root)) == (3, "", []), run
    assert run.err.startswith("error: ") and len(run.err) < 700, run.err
    assert run.err[:-1].isprintable() and run.err.isascii(), run.err
    assert run.err[-1] == "\n" and all(word in run.err for word in words), run.err
    return run


@pytest.fixture
def source(tmp_path):
    """A source of two shards, after a first run, so that children have everything imported."""
    root = make_source(tmp_path / "hf", num_shards=2)
    assert call("plan", root, "--quiet") == 0
    return root


NAMES = [
    "../bait.safetensors", "{out}/bait.safetensors", "sub/../../bait.safetensors", "sub/../sub/bait.safetensors",
    "./bait.safetensors", "sub//bait.safetensors", ".sub/bait.safetensors", "sub/.bait.safetensors", "bait.safetensors/", "C:\\bait.safetensors",
    "\\\\srv\\bait.safetensors", "..\\bait.safetensors", "bait.safetensors\0", "bait.bin\0.safetensors",
    "bait\n.safetensors", "bait.safetensors\n", "\x1b[2Jbait.safetensors", "bait\x7f.safetensors", "bait.bin",
    "bait.pt", "bait", "bait.SAFETENSORS", "", ".", "..", "...safetensors", ".safetensors", ".bait.safetensors",
    "-bait.safetensors", "~/bait.safetensors", "$HOME.safetensors", "bait*.safetensors", "%2e%2e%2fbait.safetensors",
    "file:///bait.safetensors", " bait.safetensors", "sub\\bait.safetensors", "b\u0430it.safetensors", "\uff42ait.safetensors",
    "bait\u2024safetensors", "bait\u200b.safetensors", "\u202esrosnetefas.tiab", "bait.safeten\u017fors",
    "\u0661.safetensors", "\ud800.safetensors", "/dev/zero", "/proc/self/mem", "/etc/passwd",
    "b" * 244 + ".safetensors", "b" * 4096 + ".safetensors", "b/" * 2000 + ".safetensors", None, 5, 0, True, 1.5, [],
    ["bait.safetensors"], {}, {"b": 1}]
"""Names of shards in an index, every one refused although a good file stands there, where the disk can have one."""


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_name_of_a_shard(tmp_path, source, name):
    name = name.format(out=tmp_path) if type(name) is str else name
    try:
        bait = Path(os.path.join(source, name))
        bait.parent.mkdir(exist_ok=True)
        bait.exists() or bait.write_bytes((source / TWO).read_bytes())
    except (TypeError, ValueError, OSError):
        pass
    edit_text(source / INDEX, f'"{TWO}"', json.dumps(name))
    run = refused(source, INDEX, "names")
    assert set(run.opened) & {f"{source}/{ONE}", os.path.abspath(os.path.join(source, str(name)))} == set()


def edited(old, new):
    return lambda root: edit_text(root / INDEX, old, new)


def instead(name, make, *arguments):
    return lambda root: replace(root / name, make, *arguments)


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.with_name("s")))
    path.with_name("s").rename(path)


def doubled(root):
    """A tensor that the index has in the second shard stands in the first one, too."""
    begin, raw = 8 + int.from_bytes((root / ONE).read_bytes()[:8], "little"), (root / ONE).read_bytes()
    entry = {"dtype": "BF16", "shape": [16], "data_offsets": [len(raw) - begin, len(raw) - begin + 32]}
    (root / ONE).write_bytes(raw_file(json.dumps(json.loads(raw[8:begin]) | {NORM: entry}), raw[begin:] + bytes(32)))


MAPS = ["null", "[]", "{}", '""', "5", "true", '["model.safetensors"]', "NaN", "1e400", "9" * 5000, '{"a":{"b":"c"}}']
OPEN, PLACE, LONG = '"weight_map": {', f'"{NORM}": "{TWO}"', '"\\u001b[2J\\n\\u202e%s"' % ("k" * 9999)
CONTENTS = [
    *[(f"map {text:.9}", lambda root, text=text: (root / INDEX).write_text('{"weight_map":%s}' % text), [INDEX])
      for text in MAPS],
    ("no map", edited("weight_map", "weights"), ["weight_map"]), ("mark", edited("{\n", "\ufeff{\n"), ["JSON"]),
    ("cut", lambda root: os.truncate(root / INDEX, 300), ["JSON"]), ("behind", edited("\n}", "\n}{}"), ["JSON"]),
    ("UTF-16", lambda root: (root / INDEX).write_bytes((root / INDEX).read_text().encode("utf-16")), ["JSON"]),
    ("two maps", edited(OPEN, '"weight_map": {}, ' + OPEN), ["twice"]),
    ("key twice", edited(PLACE, f'{PLACE},\n"{NORM}" : "{ONE}"'), ["twice", NORM, "lines 2"]),
    ("key twice, escaped", edited(PLACE, f'{PLACE},"\\u006d{NORM[1:]}":"{ONE}"'), ["twice"]),
    ("11 MiB", edited(OPEN, " " * 11 * 2**20 + OPEN), ["10485760"]),
    ("deep", edited(OPEN, '{"weight_map":' * 10**5), ["JSON"]),
    ("in two shards", doubled, [NORM, ONE, TWO]),
    ("not in the index", edited(f",\n  {PLACE}", ""), [NORM, TWO, "does not name it"]),
    ("in no shard", edited(PLACE, f'{PLACE},"phantom":"{TWO}"'), ["phantom", TWO, "no shard"]),
    ("in the other shard", edited(PLACE, f'"{NORM}": "{ONE}"'), [NORM, ONE, TWO]),
    ("hostile key", edited(PLACE, f'{PLACE},{LONG}:"{TWO}"'), [r"\x1b[2J\n\u202e", "no shard"]),
    *[(f"shard {what}", instead(TWO, make, *arguments), [TWO]) for what, make, *arguments in [
        ("a folder", os.mkdir), ("link to a folder", os.symlink, "/tmp"), ("a pipe", os.mkfifo), ("a socket", listen),
        ("a device", os.symlink, "/dev/zero"), ("a terminal", os.symlink, "/dev/tty"), ("a loop", os.symlink, TWO),
        ("dangling", os.symlink, "nowhere"), ("no file", os.symlink, "/proc/self/maps"), ("empty", Path.touch)]],
    ("shard link to a pipe", lambda root: (os.mkfifo(root / "p"), instead(TWO, os.symlink, "p")(root)), [TWO]),
    ("shard in other case", lambda root: (root / TWO).rename(root / TWO.upper()), [TWO]),
    *[(f"index {what}", instead(INDEX, make, *arguments), ["2 shards"]) for what, make, *arguments in [
        ("a folder", os.mkdir), ("a pipe", os.mkfifo), ("endless", os.symlink, "/dev/zero")]],
    ("only a pipe", lambda root: (os.unlink(root / INDEX), os.mkfifo(root / "model.safetensors")), ["3 shards"]),
    ("config a pipe", instead("config.json", os.mkfifo), ["config.json"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in CONTENTS])
def test_index_and_shards(source, change, words):
    change(source)
    refused(source, *words)


def test_what_links_are_followed(source):
    """The same checks let a good source through, also one of links, as in a cache: shards are opened by their names."""
    (source / TWO).rename(source.parent / "blob")
    (source / TWO).symlink_to("../blob")
    run = in_child("plan", source, "--quiet")
    assert (run.code, run.err, outside(run, source)) == (0, "", [])
    assert {f"{source}/{name}" for name in (ONE, TWO, INDEX)} <= set(run.opened)
