"""The one command: `python -m benchmarks`; `--full` adds a 7B. Results go to `benchmarks/results/`."""
from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import draw
from benchmarks.readme import write_documents
from benchmarks.rounds import Plan
from benchmarks.sections import SECTIONS, Bench, document_of
from benchmarks.sources import NBYTES, shape_for, sources_in
from benchmarks.tables import markdown_of, table_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def write(document: dict[str, Any], base: Path) -> None:
    """BASE.json, BASE.md and the pictures."""
    base.parent.mkdir(parents=True, exist_ok=True)
    rows = re.sub(r"\[[-\d.,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(document, indent=1))
    base.with_suffix(".json").write_text(rows + "\n")
    redraw(base.with_suffix(".json"))


def redraw(path: Path) -> None:
    """Table and pictures again, from the JSON."""
    document = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown_of(document))
    try:
        draw(document, path.with_suffix(""))
    except ImportError as error:
        print(f"no pictures: {error}; pip install 'stream_reshard[bench]'", file=sys.stderr)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="a 7B, more rounds; results are named SECTION_full")
    add("--only", action="append", choices=SECTIONS, metavar="NAME",
        help="a section, may be given again: " + ", ".join(SECTIONS))
    add("--shape", choices=NBYTES, help="the model (default: 1.3B, or 0.3B where memory or disk are small; 7B if full)")
    add("--rounds", type=int, help="interleaved rounds (default 3, full 5)")
    add("--scratch", type=Path, metavar="DIR", help="for data (default: a folder beside the results, removed again)")
    add("--sources", type=Path, metavar="DIR", help="holds sources by name of shape, such as llama-7b, to be used")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="for JSON, Markdown and PNG")
    add("--lock", type=Path, metavar="FILE", help="lock it (flock) for each round: for machines where others measure")
    add("--readme", action="store_true", help="measure nothing; write the results into docs/ and README.md")
    add("--redraw", action="store_true", help="measure nothing; make tables and pictures again from the JSON")
    return parser.parse_args(argv)


def _end(number: int, frame: object) -> None:
    """Unmount and remove on the way out."""
    print(f"ended by signal {number}", file=sys.stderr)
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run sections, write results, print tables."""
    arguments = arguments_of(argv)
    names = arguments.only or list(SECTIONS)
    if arguments.redraw:
        for path in sorted(arguments.results.glob("*.json")):
            redraw(path)
        return 0
    if arguments.readme:
        write_documents(ROOT, arguments.results)
        return 0
    signal.signal(signal.SIGTERM, _end)
    arguments.results.mkdir(parents=True, exist_ok=True)
    parent = arguments.scratch or arguments.results.parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch_", dir=parent))
    try:
        with sources_in(arguments.sources or scratch / "sources", arguments.lock) as sources:
            plan = Plan(arguments.rounds or (5 if arguments.full else 3), arguments.lock)
            for name in names:
                shape = arguments.shape or shape_for(name, scratch, arguments.full)
                document = document_of(name, Bench(scratch, sources, shape, plan, arguments.full))
                write(document, arguments.results / (name + "_full" * arguments.full))
                print(f"\n{name}\n\n{table_of(document)}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
