"""What is run: one function per section, each makes its cases, runs them in rounds and returns its results as JSON."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bench import MIB, Bench, Peer
from benchmarks.fits import SWEPT
from benchmarks.groups import memory_group
from benchmarks.images import MAKERS, mounted
from benchmarks.rounds import Case
from benchmarks.sources import Source
from benchmarks.training import training
from benchmarks.ways import ways

OPTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("default", ()),
    ("--workers 1", ("--workers", "1")),
    ("--workers 2", ("--workers", "2")),
    ("--workers 4", ("--workers", "4")),
    ("--io mmap", ("--io", "mmap")),
    ("--io pread", ("--io", "pread")),
    ("--digests none", ("--digests", "none")),
    ("--digests all", ("--digests", "all")),
)
"""Variants of this tool: a name, flags. One whose flags the tool does not know is reported so."""


PEERS = (
    Peer("safe_open().get_slice + save_file", "get_slice", ("torch", "safetensors")),
    Peer("torch DCP consolidation (inverse job)", "consolidate", ("torch", "safetensors"), prepares=True),
    Peer("mergekit, plain copy", "mergekit", ("torch", "mergekit")),
    Peer("transformers from_pretrained + save_pretrained", "transformers", ("torch", "transformers")),
    Peer("naive: load all, fuse, chunk, save_file", "naive", ("torch", "safetensors"), 1.2),
)


def peers(bench: Bench) -> dict[str, Any]:
    """This tool and others, TP=4 PP=2, cold source, all durable."""
    source = bench.sources.get(bench.shape)
    with ExitStack() as stack:
        cases = [bench.copy(source), bench.ours("stream_reshard", source)]
        cases += [bench.peer(peer, bench.input_of(peer, source, stack)) for peer in PEERS]
        return {"cases": bench.run(cases)}


def speed(bench: Bench) -> dict[str, Any]:
    """This tool and cp: cold and warm, three topologies, two limits."""
    source = bench.sources.get(bench.shape)
    cases = []
    for state in ("cold", "warm"):
        name, is_warm = f"cp -r && sync, {state}", state == "warm"
        cases.append(bench.copy(source, name=name, reference=name, is_warm=is_warm))
        cases += [bench.ours(f"TP={tp} PP={pp}, {limit} MiB, {state}", source, tp, pp, limit * MIB, reference=name,
                             is_warm=is_warm) for tp, pp in ((4, 2), (8, 1), (2, 4)) for limit in (256, 64)]
    return {"cases": bench.run(cases)}


def groups(bench: Bench) -> dict[str, Any]:
    """Inside control groups that count the page cache, against this tool's own run outside of any."""
    source = bench.sources.get(bench.shape)
    outside, copied_outside = "stream_reshard, no group", "cp -r && sync, no group"
    with ExitStack() as stack:
        cases = [bench.ours(outside, source, reference=outside)]
        for limit in (64, 256):
            ours = bench.ours(f"stream_reshard in {limit} MiB", source, limit=limit * MIB, reference=outside)
            copy = bench.copy(source, name=f"cp -r && sync in {limit} MiB", reference=copied_outside)
            cases += [_grouped(case, limit * MIB, stack) for case in (ours, copy)]
        return {"cases": bench.run([*cases, bench.copy(source, name=copied_outside, reference=copied_outside)])}


def _grouped(case: Case, nbytes: int, stack: ExitStack) -> Case:
    try:
        return replace(case, group=stack.enter_context(memory_group(nbytes)),
                       facts={**case.facts, "group_nbytes": nbytes})
    except OSError as error:
        return replace(case, skipped=f"no memory control group: {error}")


def options(bench: Bench) -> dict[str, Any]:
    """Variants of this tool, TP=4 PP=2, cold."""
    source = bench.sources.get(bench.shape)
    return {"cases": bench.run([bench.copy(source), *(bench.ours(name, source, extra=extra)
                                                      for name, extra in OPTIONS)])}


def clones(bench: Bench) -> dict[str, Any]:
    """On file systems that share blocks."""
    source = bench.sources.get(bench.shape)
    results = []
    for kind in MAKERS:
        try:
            with mounted(kind, bench.scratch / kind, int(source.nbytes * 2.3) + 2**30) as point:
                results += bench.run(_cloned(bench, source, kind, point))
        except OSError as error:
            results += bench.run([bench.ours(f"{kind}", source, skipped=f"no {kind} here: {error}")])
    return {"cases": results}


def _cloned(bench: Bench, source: Source, kind: str, point: Path) -> list[Case]:
    inside = Source(point / "source", source.nbytes)
    shutil.copytree(source.path, inside.path)
    how: dict[str, Any] = {"output": point / "out" / "run", "reference": f"{kind}: cp --reflink=never -r && sync",
                           "counts_space": True}
    copy = bench.copy(inside, name=how["reference"], **how)
    copy = replace(copy, command=("cp", "--reflink=never", *copy.command[1:]))
    return [copy, *(bench.ours(f"{kind}: TP={tp} PP={pp}", inside, tp, pp, **how) for tp, pp in ((1, 4), (4, 2)))]


def growth(bench: Bench) -> dict[str, Any]:
    """How time and memory grow with the model and with TP, cold."""
    shapes = ["llama-0.3b", "llama-1.3b", "llama-2.7b"] + ["llama-7b"] * bench.is_full
    cases = []
    for shape in bench.sources.fitting(shapes):
        source = bench.sources.get(shape)
        copy = bench.copy(source, name=f"{shape}: cp -r && sync", reference=f"{shape}: cp -r && sync",
                          facts={"shape": shape})
        cases.append(copy)
        tps = (1, 2, 4, 8, 16) if shape == SWEPT else (4,)
        for tp in tps:
            ours = bench.ours(f"{shape}: TP={tp} PP=2", source, tp, 2, reference=copy.name)
            cases.append(replace(ours, facts={**ours.facts, "shape": shape}))
    return {"cases": bench.run(cases)}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "peers": peers, "speed": speed, "groups": groups, "options": options, "clones": clones, "growth": growth,
    "ways": ways, "training": training}


def document_of(name: str, bench: Bench) -> dict[str, Any]:
    """Run a section: everything that its table and pictures say."""
    facts = machine.facts(bench.scratch)
    return {"section": name, "shape": bench.shape, "num_rounds": bench.plan.num_rounds,
            "is_rehearsed": bench.plan.settles, "machine": facts, **SECTIONS[name](bench)}
