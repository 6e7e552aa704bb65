"""Cases in interleaved rounds (A B C, C B A, A B C), and the ratios within each round.

A machine changes over minutes, for all alike; so a case is compared with the reference of its own round only.
"""
from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.groups import Group
from benchmarks.images import used_nbytes
from benchmarks.measure import Measurement, measure

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One way to move the weights."""

    name: str
    """Unique in its section."""
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    """Folders."""
    output: Path
    """What it makes. The folder that holds it is emptied before and after every run."""
    source_nbytes: int
    reference: str = ""
    """The case that its time is divided by."""
    limit: str = ""
    """Another case that its time is divided by: the limit itself."""
    written: float = 1.0
    """Size of its output, as a multiple of what it reads."""
    is_warm: bool = False
    """Whether the source is in the page cache when it starts."""
    needs_sync: bool = False
    """Whether its output is on disk only after `sync`, which then counts as part of it."""
    warm_up: tuple[str, ...] = ()
    """A command that brings the program itself into the cache: cold is the source, not the program."""
    group: Group | None = None
    counts_space: bool = False
    """Whether the file system belongs to this run alone, so that the space it uses can be told."""
    watches_disk: bool = False
    """Whether the space that its output and all beside it take is watched while it runs."""
    skipped: str = ""
    """Why it cannot be run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a table or a picture wants to know of it."""


@dataclass
class Outcome:
    """The runs of a case."""

    case: Case
    runs: dict[int, Measurement] = field(default_factory=dict)
    """By round."""
    status: str = "ok"
    used: list[int] = field(default_factory=list)
    """Bytes of disk that each run took, where they are counted."""
    told: dict[str, Any] = field(default_factory=dict)
    """What the last run printed as JSON, numbers only."""


@dataclass(frozen=True)
class Plan:
    """How rounds are run."""

    num_rounds: int
    lock: Path | None = None
    """Held for each round, on machines where others measure too."""
    settles: bool = True
    """Whether the machine is brought into a known state before each run, and the disk before each round."""


def run_rounds(cases: Sequence[Case], plan: Plan) -> list[dict[str, Any]]:
    """Run every case in every round; their results as JSON."""
    outcomes = [Outcome(case, status=case.skipped or "ok") for case in cases]
    for number in range(plan.num_rounds):
        with locked(plan.lock, fcntl.LOCK_EX):
            if plan.settles:
                _rehearse(outcomes, 2 if number == 0 else 1)
            for outcome in outcomes if number % 2 == 0 else outcomes[::-1]:
                if outcome.status == "ok":
                    _run(outcome, number, plan)
    by_name = {outcome.case.name: outcome for outcome in outcomes}
    return [as_json(outcome, by_name) for outcome in outcomes]


def _rehearse(outcomes: Sequence[Outcome], times: int) -> None:
    """Run the references without noting it: a virtual disk is slower on blocks that its host has to find first."""
    references = {outcome.case.reference for outcome in outcomes}
    for outcome in outcomes:
        if outcome.case.name in references and outcome.status == "ok":
            for _ in range(times):
                _clear(outcome.case.output.parent)
                machine.settle(outcome.case.reads, outcome.case.is_warm)
                measure(outcome.case.command, cwd=ROOT, env=machine.ENVIRONMENT, sync=outcome.case.needs_sync)


@contextmanager
def locked(path: Path | None, kind: int) -> Iterator[None]:
    """Hold a lock on a file, if one is given."""
    if path is None:
        yield
        return
    with open(path, "ab") as stream:
        fcntl.flock(stream, kind)
        yield


def _run(outcome: Outcome, number: int, plan: Plan) -> None:
    case = outcome.case
    _clear(case.output.parent)
    if plan.settles:
        machine.settle(case.reads, case.is_warm, case.warm_up)
    before = used_nbytes(case.output.parent) if case.counts_space else 0
    command = case.group.wrap(case.command) if case.group else case.command
    run = measure(command, cwd=ROOT, env=machine.ENVIRONMENT, sync=case.needs_sync,
                  watched=case.output.parent if case.watches_disk else None)
    if case.counts_space:
        outcome.used.append(used_nbytes(case.output.parent) - before)
    outcome.status = problem_of(run, case)
    if outcome.status == "ok":
        outcome.runs[number] = run
        outcome.told = _told(run.stdout)
    _clear(case.output.parent)
    print(f"round {number + 1}  {case.name:<44} {run.seconds:7.2f} s {run.peak_rss / 2**20:8.0f} MiB  {outcome.status}",
          file=sys.stderr, flush=True)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def problem_of(run: Measurement, case: Case) -> str:
    """Why a run does not count; "ok" if it does."""
    if run.exit_code == 2 and ("unrecognized arguments" in run.stderr or "invalid choice" in run.stderr):
        return "this version does not know the flag"
    if run.exit_code:
        lines = run.stderr.strip().splitlines() or ["no message"]
        ended = f"signal {-run.exit_code}" if run.exit_code < 0 else f"exit code {run.exit_code}: {lines[-1][:200]}"
        return f"did not finish ({ended})"
    nbytes = sum(path.stat().st_size for path in case.output.rglob("*") if path.is_file())
    wanted = int(case.source_nbytes * case.written)
    if nbytes < wanted * 0.99:
        return f"wrote {nbytes} of {wanted} bytes"
    return "ok"


def _told(stdout: str) -> dict[str, Any]:
    try:
        document = json.loads(stdout)
    except ValueError:
        return {}
    return {key: value for key, value in document.items() if type(value) in (int, float)}


def ratios_of(runs: Mapping[int, Measurement], reference: Outcome | None) -> list[float]:
    """Time over the reference's of the same round, for each round that has both."""
    others = reference.runs if reference else {}
    return [round(runs[n].seconds / others[n].seconds, 4) for n in sorted(runs.keys() & others.keys())]


def as_json(outcome: Outcome, by_name: Mapping[str, Outcome]) -> dict[str, Any]:
    """The result of a case; seconds and bytes, one number per round."""
    case, runs = outcome.case, [outcome.runs[n] for n in sorted(outcome.runs)]
    last = runs[-1].series if runs else ()
    return {
        "name": case.name, "status": outcome.status, "state": "warm" if case.is_warm else "cold",
        "source_nbytes": case.source_nbytes, "needs_sync": case.needs_sync, **case.facts,
        "reference": case.reference, "ratios": ratios_of(outcome.runs, by_name.get(case.reference)),
        "limit": case.limit, "limit_ratios": ratios_of(outcome.runs, by_name.get(case.limit)),
        "seconds": [round(run.seconds, 4) for run in runs], "sync_seconds": [round(r.sync_seconds, 4) for r in runs],
        "peak_rss": [run.peak_rss for run in runs], "peak_anon": [run.peak_anon for run in runs],
        "bytes": [asdict(run.bytes) for run in runs], "used_nbytes": outcome.used,
        "peak_disk": [run.peak_disk for run in runs] if case.watches_disk else [], "told": outcome.told,
        "series": [[round(sample.seconds, 4), sample.rss, sample.anon] for sample in last]}
