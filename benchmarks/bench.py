"""What the sections work with: sources, a place for outputs, and the cases that most of them have."""
from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rounds import Case, Plan, run_rounds
from benchmarks.sources import Source, Sources

MIB = 2**20
OURS = (sys.executable, "-m", "stream_reshard")
WARM_UP = (*OURS, "demo", "--quiet")


@dataclass(frozen=True)
class Bench:
    """What the sections have to work with."""

    scratch: Path
    sources: Sources
    shape: str
    plan: Plan
    is_full: bool = False

    @property
    def output(self) -> Path:
        """Where cases write, one after the other."""
        return self.scratch / "out" / "run"

    def copy(self, source: Source, output: Path | None = None, **how: Any) -> Case:
        """`cp -r SRC OUT && sync`: the floor."""
        output = output or self.output
        case = Case("cp -r && sync", ("cp", "-r", str(source.path), str(output)), (source.path,), output, source.nbytes,
                    reference="cp -r && sync", needs_sync=True, warm_up=("cp", "--version"))
        return replace(case, **how)

    def ours(self, name: str, source: Source, tp: int = 4, pp: int = 2, limit: int = 256 * MIB,
             extra: Sequence[str] = (), output: Path | None = None, **how: Any) -> Case:
        """This tool; its output is durable when it ends."""
        output = output or self.output
        command = (*OURS, str(source.path), str(output), "--tp", str(tp), "--pp", str(pp), "--max-memory", str(limit),
                   "--json", *extra)
        facts = {"is_ours": True, "tp": tp, "pp": pp, "limit_nbytes": limit, "flags": list(extra)}
        case = Case(name, command, (source.path,), output, source.nbytes, reference="cp -r && sync", warm_up=WARM_UP,
                    facts=facts)
        return replace(case, **how)

    def run(self, cases: Iterable[Case]) -> list[dict[str, Any]]:
        """Their results."""
        return run_rounds(list(cases), self.plan)
