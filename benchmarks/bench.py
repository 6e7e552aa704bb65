"""What the sections work with: sources, a place for outputs, and the cases that most of them have."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.rounds import ROOT, Case, Plan, run_rounds
from benchmarks.sources import Source, Sources, source_at

MIB = 2**20
OURS = (sys.executable, "-m", "stream_reshard")
WARM_UP = (*OURS, "demo", "--quiet")


@dataclass(frozen=True)
class Peer:
    """Another tool: a script in `peers/`."""

    name: str
    script: str
    needs: tuple[str, ...]
    """Packages."""
    holds: float = 0.2
    """Anonymous memory that it takes, about, as a multiple of the source."""
    prepares: bool = False
    """Whether it works on an input of its own, which it makes with --prepare."""

    @property
    def command(self) -> tuple[str, ...]:
        """The script, before its arguments."""
        return sys.executable, "-m", f"benchmarks.peers.{self.script}"

    def obstacle(self, source: Source) -> str:
        """Why it cannot be run here; "" if it can."""
        if missing := [name for name in self.needs if importlib.util.find_spec(name) is None]:
            return f"not installed: {', '.join(missing)}"
        needed, there = self.holds * source.nbytes, machine.available()
        return f"needs {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} are free" if needed > there else ""


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

    def peer(self, peer: Peer, source: Source, **how: Any) -> Case:
        """Another tool on its input."""
        case = Case(peer.name, (*peer.command, str(source.path), str(self.output)), (source.path,), self.output,
                    source.nbytes, reference="cp -r && sync", needs_sync=True, warm_up=(*peer.command, "--help"),
                    skipped=peer.obstacle(source))
        return replace(case, **how)

    def input_of(self, peer: Peer, source: Source, stack: ExitStack) -> Source:
        """The input of a tool that can be run: the source, or what it prepares from it, removed at the end."""
        if not peer.prepares or peer.obstacle(source):
            return source
        path = self.scratch / f"for_{peer.script}"
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        subprocess.run([*peer.command, str(source.path), str(path), "--prepare"], cwd=ROOT, check=True)
        return source_at(path)

    def run(self, cases: Iterable[Case]) -> list[dict[str, Any]]:
        """Their results."""
        return run_rounds(list(cases), self.plan)
