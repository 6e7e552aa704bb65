"""Whole trainings that move to another topology, beside cp, a script with torch, and DeepSpeed's nearest thing."""
from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench import OURS, Bench, Peer
from benchmarks.rounds import ROOT, Case
from benchmarks.sources import Source, source_at

SAVED, MOVED = "TP=2 DP=2 ZeRO-1", "TP=4 PP=2 ZeRO-0"
LOAD_ALL = Peer(f"torch: load all, join, cut, save, to {MOVED}", "load_all", ("torch", "safetensors"), 2.0)
UNIVERSAL = Peer("DeepSpeed ds_to_universal", "deepspeed", ("torch", "deepspeed"), 1.5, prepares=True)
_THERE = ("--to", "nanotron", "--zero", "0")
_BACK = ("--to", "nanotron", "--zero", "1", "--dp", "2")


def training(bench: Bench) -> dict[str, Any]:
    """There and back, and what others do; each source has its own cp."""
    with ExitStack() as stack:
        saved = _saved(bench, stack)
        moved = _moved(bench, saved, stack)
        zero = bench.input_of(UNIVERSAL, saved, stack)
        copies = [bench.copy(source, name=f"cp -r && sync: {name}", reference=f"cp -r && sync: {name}")
                  for name, source in ((SAVED, saved), (MOVED, moved), ("DeepSpeed ZeRO-1", zero))]
        of_saved, of_moved, of_zero = (copy.name for copy in copies)
        universal = bench.peer(UNIVERSAL, zero, reference=of_zero)
        cases = [
            copies[0], bench.ours(f"stream_reshard to {MOVED}", saved, 4, 2, extra=_THERE, reference=of_saved),
            bench.peer(LOAD_ALL, saved, reference=of_saved),
            copies[1], bench.ours(f"stream_reshard to {SAVED}", moved, 2, 1, extra=_BACK, reference=of_moved),
            *([] if universal.skipped else [copies[2]]), universal]
        return {"cases": bench.run(_watched(case) for case in cases)}


def _watched(case: Case) -> Case:
    return replace(case, watches_disk=True)


def _saved(bench: Bench, stack: ExitStack) -> Source:
    """A training as Nanotron saves it, of random bits."""
    path = _new(bench, "saved", stack)
    _run(*OURS, bench.sources.get(bench.shape).path, path, "--tp", 2, "--quiet")
    _run(sys.executable, "-m", "benchmarks.synthetic_training", path, "--dp", 2, "--zero", 1)
    return source_at(path)


def _moved(bench: Bench, saved: Source, stack: ExitStack) -> Source:
    """The same training after its move: the source of the way back."""
    path = _new(bench, "moved", stack)
    _run(*OURS, saved.path, path, *_THERE, "--tp", 4, "--pp", 2, "--quiet")
    return source_at(path)


def _new(bench: Bench, name: str, stack: ExitStack) -> Path:
    """A folder that is removed at the end."""
    path = bench.scratch / name
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    return path


def _run(*words: object) -> None:
    """A step outside the timed part."""
    subprocess.run(list(map(str, words)), cwd=ROOT, check=True)
