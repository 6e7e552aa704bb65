"""The section of all ways: each ends well, beside cp or cat and beside the limit of the same bytes."""
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench import Bench
from benchmarks.pictures import ways as picture
from benchmarks.rounds import Plan
from benchmarks.sources import Sources, source_at
from benchmarks.synthetic import SHAPES, _llama, write_source
from benchmarks.tables import table_of
from benchmarks.ways import WAYS, ways

ROOT = Path(__file__).parents[1]
LLAMA = _llama(256, 768, 4, 8, 8, 4096)
TINY = {"llama-tiny": LLAMA, "llama-tiny-float32": LLAMA | {"torch_dtype": "float32"},
        "qwen2-moe-tiny": SHAPES["qwen2-moe-0.3b"] | LLAMA | {
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4,
            "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name, config in TINY.items():
        write_source(root / name, config, 4 * 10**6)
    return Sources(root)


@pytest.mark.heavy
def test_every_way_beside_its_baseline_and_its_limit(tmp_path, sources):
    """Baseline and limit are of the same bytes and of the same round, and nothing is left."""
    cases = ways(Bench(tmp_path, sources, "llama-tiny", Plan(1, settles=False)))["cases"]
    by_name = {case["name"]: case for case in cases}
    assert {case["status"] for case in cases} == {"ok"}
    assert [case["name"] for case in cases if case.get("is_ours")] == [way.name for way in WAYS]
    for case in cases:
        for kind, ratios in (("reference", "ratios"), ("limit", "limit_ratios")):
            other = by_name[case[kind]]
            assert other["source_nbytes"] == case["source_nbytes"] and other["name"].split(": ")[0] in (
                ("cp -r && sync", "cat") if kind == "reference" else ("limit",))
            assert case[ratios] == [pytest.approx(case["seconds"][0] / other["seconds"][0], rel=0.02, abs=1e-3)]
        assert 0 < case["peak_rss"][0] and ("cat" in case["reference"]) == ("verify" in case["name"] or " and " in case["name"])
    assert list(tmp_path.glob("*-cut")) == []
    table = table_of({"section": "ways", "cases": cases})
    assert "x of the limit" in table and table.count("**") == 2 * len(WAYS)


def test_the_picture_has_both_ratios_of_each_round():
    pytest.importorskip("matplotlib")
    cases = [{"name": name, "status": "ok", "is_ours": name != "cp", "ratios": [1.5, 1.0], "limit_ratios": [2.0, 2.5]}
             for name in ("cp", "one", "other")]
    facts = {"cpu": "c", "num_cores": 2, "memory_nbytes": 2**30, "file_system": "ext4", "commit": "d", "date": "e"}
    (panel,) = picture({"section": "ways", "shape": "s", "num_rounds": 2, "machine": facts, "cases": cases}).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["one", "other"]
    assert [list(line.get_xdata()) for line in panel.lines if line.get_label() == "rounds"] == [[1.5, 1.0], [2.0, 2.5]] * 2


@pytest.mark.parametrize("tree", ["llama-tiny", "qwen2-moe-tiny"])
def test_the_limit_copies_every_byte(tmp_path, sources, tree):
    source, copied = sources.root / tree, tmp_path / "out"
    subprocess.run([sys.executable, "-m", "benchmarks.peers.limit", source, "--to", copied], cwd=ROOT, check=True)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()}


def test_the_limit_passes_pieces_of_any_size(tmp_path, monkeypatch):
    """More pieces than buffers, more than may wait for the disk, an empty file, a folder below."""
    from benchmarks.peers import limit
    monkeypatch.setattr(limit, "_PIECE_NBYTES", 4096)
    monkeypatch.setattr(limit.resource, "setrlimit", lambda *limits: None)
    (tmp_path / "in" / "below").mkdir(parents=True)
    for number, size in enumerate([0, 1, 4096, 4097, 300_000]):
        (tmp_path / "in" / "below" / str(number)).write_bytes(bytes(i * 7 % 251 for i in range(size)))
    limit.copy(tmp_path / "in", tmp_path / "out")
    limit.read([tmp_path / "out", tmp_path / "in"])
    for path in (tmp_path / "in" / "below").iterdir():
        assert (tmp_path / "out" / "below" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_source_of_float32_is_twice_as_large(sources):
    one, two = (source_at(sources.root / name).nbytes for name in ("llama-tiny", "llama-tiny-float32"))
    assert two == pytest.approx(2 * one, rel=0.05)
