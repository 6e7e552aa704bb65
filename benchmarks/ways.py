"""Every way of this tool, against cp and against the limit of the same source in the same rounds."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.bench import MIB, OURS, WARM_UP, Bench
from benchmarks.rounds import ROOT, Case
from benchmarks.sources import Source, source_at

LIMIT_NBYTES = 512 * MIB
"""The default of --max-memory."""
_LIMIT = (sys.executable, "-m", "benchmarks.peers.limit")
_CUT = ("--tp", "4", "--pp", "2")


@dataclass(frozen=True)
class Way:
    """Work of this tool: a conversion of one tree, or a comparison of two."""

    name: str
    trees: tuple[str, ...]
    flags: tuple[str, ...] = ()
    written: float = 1.0
    """Size of the output, as a multiple of the source."""


WAYS = (
    Way("Llama to Nanotron TP=4 PP=2", ("Llama",), _CUT),
    Way("Llama, bfloat16 to float32", ("Llama",), (*_CUT, "--dtype", "float32"), 2.0),
    Way("Llama, Nanotron to Hugging Face", ("cut Llama",), ("--to", "hf")),
    Way("Llama, Nanotron TP=4 PP=2 to TP=8", ("cut Llama",), ("--to", "nanotron", "--tp", "8")),
    Way("Llama, float32 to bfloat16", ("float32 Llama",), (*_CUT, "--dtype", "bfloat16"), 0.5),
    Way("verify Llama", ("Llama", "cut Llama"), written=0.0),
    Way("Qwen2-MoE to Nanotron TP=4 PP=2", ("Qwen2-MoE",), _CUT),
    Way("Qwen2-MoE, Nanotron to Hugging Face", ("cut Qwen2-MoE",), ("--to", "hf")),
    Way("verify Qwen2-MoE", ("Qwen2-MoE", "cut Qwen2-MoE"), written=0.0),
)
"""Those that cast or convert a Hugging Face folder give Nanotron TP=4 PP=2."""


def ways(bench: Bench) -> dict[str, Any]:
    """Cold, with the default limit on memory."""
    with ExitStack() as stack:
        trees = _trees(bench, stack)
        cases: dict[str, Case] = {}
        for way in WAYS:
            sources = [trees[name] for name in way.trees]
            floors = _floors(bench, " and ".join(way.trees), sources)
            cases |= {case.name: case for case in (*floors, _ours(bench, way, sources, floors))}
        return {"cases": bench.run(cases.values())}


def _trees(bench: Bench, stack: ExitStack) -> dict[str, Source]:
    """What is converted and compared, by name."""
    llama, wide, moe = map(bench.sources.get, (bench.shape, f"{bench.shape}-float32",
                                               bench.shape.replace("llama", "qwen2-moe")))
    return {"Llama": llama, "float32 Llama": wide, "Qwen2-MoE": moe,
            "cut Llama": _cut(bench, llama, stack), "cut Qwen2-MoE": _cut(bench, moe, stack)}


def _cut(bench: Bench, source: Source, stack: ExitStack) -> Source:
    """The Nanotron checkpoint of a source, made outside the timed part and removed at the end."""
    path = bench.scratch / f"{source.path.name}-cut"
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    subprocess.run([*OURS, source.path, path, *_CUT, "--quiet"], cwd=ROOT, check=True)
    return source_at(path)


def _floors(bench: Bench, name: str, sources: Sequence[Source]) -> tuple[Case, Case]:
    """The baseline and the limit: of one source both copy it, of two both read them."""
    paths, nbytes = tuple(source.path for source in sources), sum(source.nbytes for source in sources)
    words = tuple(map(str, paths))
    if len(sources) == 1:
        base = bench.copy(sources[0], name=f"cp -r && sync: {name}")
        command = (*_LIMIT, *words, "--to", str(bench.output))
    else:
        read = ("sh", "-c", 'find "$@" -type f -exec cat {} + > /dev/null', "sh", *words)
        base = Case(f"cat: {name}", read, paths, bench.output, nbytes, written=0.0, warm_up=("cat", "--version"))
        command = (*_LIMIT, *words)
    limit = f"limit: {name}"
    base = replace(base, reference=base.name, limit=limit)
    return base, replace(base, name=limit, command=command, needs_sync=False, warm_up=(*_LIMIT, "--help"))


def _ours(bench: Bench, way: Way, sources: Sequence[Source], floors: tuple[Case, Case]) -> Case:
    """The way, and what its time is divided by."""
    paths = tuple(source.path for source in sources)
    folders = ("verify", *map(str, paths)) if len(paths) == 2 else (str(paths[0]), str(bench.output))
    command = (*OURS, *folders, *way.flags, "--max-memory", str(LIMIT_NBYTES), "--json")
    base, limit = floors
    return Case(way.name, command, paths, bench.output, base.source_nbytes, reference=base.name, limit=limit.name,
                written=way.written, warm_up=WARM_UP,
                facts={"is_ours": True, "limit_nbytes": LIMIT_NBYTES, "flags": list(way.flags)})
