"""SHA-256 sums of the shards, in a file or in a cache's names: what does not have its sum is refused."""
import hashlib
import random

import pytest
from running import call, said
from sources import ONE, TWO, make_source


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


SUMS = [
    ("as sha256sum writes it", "{a}  {ONE}\n{b}  {TWO}\n", 0, []), ("empty", "", 2, ["no sum"]),
    ("junk", "\0\x1b[2J" * 9999, 2, ["no sum"]),
    ("binary, in a folder, with others", "{Z} *x\n{a} *./{ONE}\n\n# x\n{B}  {TWO}\r\n", 0, []),
    ("wrong", "{a}  {ONE}\n{Z}  {TWO}\n", 3, ["{TWO}", "{Z}", "{b}"]),
    ("exchanged", "{b}  {ONE}\n{a}  {TWO}\n", 3, ["{ONE}", "{TWO}", "{a}", "{b}"]),
    ("one missing", "{a}  {ONE}\n", 3, ["{TWO}", "no sum"]),
    ("last digits wrong", "{a}  {ONE}\n{b:.56}{Z:.8}  {TWO}\n", 3, ["{TWO}", "{b}"]),
    ("of other folders", "{a}  x/{ONE}\n{b}  ../{TWO}\n", 2, ["no sum"]),
    ("twice", "{b}  {TWO}\n{a}  {ONE}\n{Z}  {TWO}\n", 2, ["{TWO}", "two sums"]),
    ("twice, right at last", "{Z}  {TWO}\n{a}  {ONE}\n{b}  {TWO}\n", 2, ["{TWO}", "two sums"])]


@pytest.mark.parametrize("text, code, words", [pytest.param(*row[1:], id=row[0]) for row in SUMS])
def test_sums_in_a_file(tmp_path, capsys, text, code, words):
    root = make_source(tmp_path / "hf", num_shards=2)
    names = {"a": sha(root / ONE), "b": sha(root / TWO), "B": sha(root / TWO).upper(), "Z": "0" * 64, "ONE": ONE,
             "TWO": TWO}
    (tmp_path / "sums").write_text(text.format(**names))
    assert call(root, tmp_path / "nt", "--quiet", "--source-sha256", tmp_path / "sums") == code
    err = said(capsys)[1]
    assert all(word.format(**names) in err for word in words) and (tmp_path / "nt").exists() == (code == 0), err


@pytest.mark.parametrize("path", ["", ".", "absent", "cache", "/proc/self/mem", "x\x1b[2J\n"], ids=ascii)
def test_sums_that_cannot_be_read(tmp_path, capsys, path):
    assert call("plan", make_source(tmp_path / "hf"), "--source-sha256", path) == 2
    assert "--source-sha256" in (err := said(capsys)[1]) and err.count("\n") == 1


def test_bit_flips_in_a_cache(tmp_path, capsys):
    """A snapshot of links to blobs, as in huggingface_hub's cache: 100 flips are refused, with file and both sums."""
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
