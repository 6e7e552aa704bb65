"""The section of trainings that move: each case does the whole job, beside a cp of its own source."""
import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.bench import OURS, Bench
from benchmarks.measure import disk_nbytes, measure
from benchmarks.rounds import Plan
from benchmarks.sources import NBYTES, Sources, shape_for
from benchmarks.synthetic import _llama, write_source
from benchmarks.tables import table_of

ROOT = Path(__file__).parents[1]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STATES = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Fewer heads of keys and values than of queries: what is fused has pieces of different sizes."""
    root = tmp_path_factory.mktemp("sources")
    write_source(root / "llama-tiny", _llama(256, 768, 4, 8, 4, 4096), 4 * 10**6)
    return Sources(root)


def bench_in(folder, sources):
    return Bench(folder, sources, "llama-tiny", Plan(1, settles=False))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, sources):
    """A training at TP=2 DP=2 with ZeRO-1."""
    with ExitStack() as stack:
        yield training._saved(bench_in(tmp_path_factory.mktemp("saved"), sources), stack)


@pytest.mark.heavy
def test_every_case_beside_the_cp_of_its_source(tmp_path, sources):
    """None is left out but DeepSpeed's, where it is not installed; and nothing is left on the disk."""
    pytest.importorskip("torch")
    cases = training.training(bench_in(tmp_path, sources))["cases"]
    by_name = {case["name"]: case for case in cases}
    skipped = [] if HAS_DEEPSPEED else ["DeepSpeed ds_to_universal"]
    assert [case["name"] for case in cases if case["status"] != "ok"] == skipped
    assert sum(bool(case.get("is_ours")) for case in cases) == 2
    for case in cases:
        if case["status"] == "ok":
            assert by_name[case["reference"]]["source_nbytes"] == case["source_nbytes"]
            assert len(case["ratios"]) == 1 and case["peak_disk"][0] > 0.9 * case["source_nbytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
    assert "disk at most" in table_of({"section": "training", "cases": cases})


def tensors_of(folder):
    """Every tensor of a Nanotron checkpoint, by its parameter, its kind and its TP rank."""
    import torch
    from safetensors.torch import load_file
    found = {}
    for path in folder.rglob("*.safetensors"):
        rank = path.name.partition("_tp-rank-")[2]
        found[path.parent.relative_to(folder), rank] = load_file(path)["data"].view(torch.int16)
    for path in folder.glob("optimizer/*.pt"):
        states, tp = torch.load(path), path.name.partition("_tp-")[2]
        for number, name in states["names"].items():
            found |= {(name, kind, tp): states["state"][number][kind].view(torch.int32) for kind in (*STATES, "step")}
            found[name, "master", tp] = states["gradient_accumulator"][name].view(torch.int32)
    return found


def test_the_script_with_torch_moves_every_tensor_as_this_tool_does(tmp_path, saved):
    pytest.importorskip("torch")
    subprocess.run([*training.LOAD_ALL.command, saved.path, tmp_path / "other"], cwd=ROOT, check=True)
    subprocess.run([*OURS, saved.path, tmp_path / "ours", *training._THERE, "--tp", "4", "--pp", "2", "--quiet"],
                   cwd=ROOT, check=True)
    ours, other = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "other")
    assert ours.keys() == other.keys() and len(ours) > 500
    assert all(ours[key].equal(other[key]) for key in ours)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
def test_deepspeed_gives_back_every_state_of_its_input(tmp_path, saved):
    """So the input is one that it understands: nothing is lost, added or mixed."""
    import torch

    from benchmarks.peers import deepspeed
    deepspeed.prepare(saved.path, tmp_path / "zero")
    subprocess.run([*training.UNIVERSAL.command, tmp_path / "zero", tmp_path / "out"], cwd=ROOT, check=True)
    config = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096, "num_attention_heads": 8,
              "num_key_value_heads": 4, "num_hidden_layers": 4}
    shapes = deepspeed.shapes_of(config)
    assert {path.name for path in (tmp_path / "out" / "zero").iterdir() if path.is_dir()} == shapes.keys()
    for name, shape in shapes.items():
        for kind, state in deepspeed.whole(name, shape).items():
            found = torch.load(tmp_path / "out" / "zero" / name / f"{kind}.pt", weights_only=False)
            assert found["param"].equal(state), (name, kind)


def test_files_that_come_and_go_count_on_the_disk(tmp_path):
    """A tool that keeps a second copy while it runs needs the room for it."""
    code = ("import os, sys, time; os.chdir(sys.argv[1])\n"
            "for name in 'ab': open(name, 'wb').write(bytes(1 << 20))\n"
            "time.sleep(0.5); os.unlink('a'); time.sleep(0.5)")
    run = measure([sys.executable, "-S", "-c", code, str(tmp_path)], watched=tmp_path)
    assert 2 * 2**20 <= run.peak_disk < 2.1 * 2**20 and 2**20 <= disk_nbytes(tmp_path) < 1.1 * 2**20


@pytest.mark.parametrize("multiple, is_full, shape", [(50, False, "llama-1.3b"), (30, False, "llama-0.3b"),
                                                      (50, True, "llama-0.3b")])
def test_a_training_takes_more_room_than_a_model(tmp_path, monkeypatch, multiple, is_full, shape):
    """A machine with room for so many models of 1.3 B: all other sections take the large model."""
    from benchmarks import sources
    room = multiple * NBYTES["llama-1.3b"]
    monkeypatch.setattr(sources.machine, "available", lambda: room)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": room}))
    assert shape_for("training", tmp_path, is_full) == shape
    assert shape_for("peers", tmp_path, is_full) == ("llama-7b" if is_full else "llama-1.3b")
