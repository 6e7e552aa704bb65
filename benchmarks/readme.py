"""Documents about the measurements, from the committed results alone: `python -m benchmarks --readme` writes them.

docs/memory-and-speed.md gets every section below its mark, README.md gets the table of one.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.tables import ABOUT, GB, fits_of, machine_line, table_of

PAGE = Path("docs") / "memory-and-speed.md"
MARK = "<!-- measured: written by python -m benchmarks --readme -->\n"
"""The text of the page behind this line is made of the results."""

_PICTURES = {
    "peers": (("_memory", "Memory over time of this tool and of others, against the limit"),
              ("", "Time against peak memory of this tool and of others")),
    "growth": (("", "Time and memory against the size of the model and against TP"),),
    "training": (("", "Time against peak memory of a training that moves"),),
    "ways": (("", "Every way against cp and against the limit"),)}

_SHOWN = ("peers", "peers_full", "ways", "ways_full", "speed", "speed_full", "groups", "options", "clones",
          "clones_full", "growth", "growth_full", "training", "training_full")
"""Results that have a section on the page, where they exist; the tables of growth are left to its picture."""


def lines_of(results: Path) -> Iterator[str]:
    """The measured part of the page, line by line."""
    found = {name: json.loads(path.read_text()) for name in _SHOWN if (path := results / f"{name}.json").exists()}
    for name, document in found.items():
        if name == "growth" and "growth_full" in found:
            continue
        yield ""
        yield from _part(name, document)


def _part(name: str, document: dict[str, Any]) -> Iterator[str]:
    section = document["section"]
    size = "" if section == "growth" else (
        f" {document['shape']}, {document['cases'][0]['source_nbytes'] / GB:.2f} GB.")
    yield f"### {name.removesuffix('_full').capitalize()}{' of a 7B' * name.endswith('_full')}\n"
    yield _wrapped(f"{ABOUT[section]}{size}") + "\n"
    if section == "growth":
        yield from (f"{fit}\n" for fit in fits_of(document))
    else:
        yield f"<!-- benchmark {name} -->\n"
        yield table_of(document)
    for suffix, text in _PICTURES.get(section, ()):
        yield f"![{text}](../benchmarks/results/{name}{suffix}.png)\n"
    rounds = document["num_rounds"]
    yield _wrapped(f"{rounds} round{'s' * (rounds != 1)} on {machine_line(document)}")


def _wrapped(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def write_documents(root: Path, results: Path) -> None:
    """Put the results into the page, and into the table of the README, below `root`."""
    page, readme = root / PAGE, root / "README.md"
    text = page.read_text()
    if MARK not in text:
        raise ValueError(f"{page} has no line {MARK.strip()}")
    page.write_text(text.partition(MARK)[0] + MARK + "\n".join(lines_of(results)) + "\n")
    readme.write_text(re.sub(r"(<!-- benchmark (\w+) -->\n\n)(?:\|.*\n)+", lambda found: found[1] + table_of(
        json.loads((results / f"{found[2]}.json").read_text())), readme.read_text()))
