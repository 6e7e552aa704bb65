"""What the README says of the measurements, from the committed results alone: `python -m benchmarks --readme`."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import ABOUT, GB, fits_of, machine_line, table_of

_INTRODUCTION = """\
`python -m benchmarks` measures this tool beside others and writes what is shown here (`--full`: a 7B; `--only peers`:
one section; `pip install -e '.[bench]'` for the others and the pictures; then `pip install --no-deps mergekit`, whose
pins ask for older releases; what is not installed is left out and said so). Every run is a process of its own, watched
from outside. Before each, caches are dropped and memory is touched and freed, so that all find the machine alike; cases
are interleaved, and a ratio is taken within a round: min / median / max. Times are those of durable output: what does
not sync its files itself is followed by `sync`. All results, with each run: `benchmarks/results/`."""

_PICTURES = {
    "peers": (("_memory", "Memory over time of this tool and of others, against the limit"),
              ("", "Time against peak memory of this tool and of others")),
    "growth": (("", "Time and memory against the size of the model and against TP"),)}

_SHOWN = ("peers", "peers_full", "speed", "speed_full", "groups", "options", "clones", "clones_full", "growth",
          "growth_full")
"""Results that have a place in the README, where they are there; the tables of growth are left to its picture."""


def lines_of(results: Path) -> Iterator[str]:
    """The section of the README, line by line."""
    found = {name: json.loads(path.read_text()) for name in _SHOWN if (path := results / f"{name}.json").exists()}
    yield "## Measured\n"
    yield _INTRODUCTION
    for name, document in found.items():
        if name == "growth" and "growth_full" in found:
            continue
        yield ""
        yield from _part(name, document)


def _part(name: str, document: dict[str, Any]) -> Iterator[str]:
    section = document["section"]
    size = "" if section == "growth" else (
        f" {document['shape']}, {document['cases'][0]['source_nbytes'] / GB:.2f} GB.")
    yield f"**{name.removesuffix('_full').capitalize()}.** {ABOUT[section]}{size}\n"
    if section == "growth":
        yield from (f"{fit}\n" for fit in fits_of(document))
    else:
        yield f"<!-- benchmark {name} -->\n"
        yield table_of(document)
    for suffix, text in _PICTURES.get(section, ()):
        yield f"![{text}](benchmarks/results/{name}{suffix}.png)\n"
    yield f"{document['num_rounds']} rounds on {machine_line(document)}"
