"""Results as Markdown, from the JSON alone: what is shown cannot differ from what is kept."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.fits import of_growth

MIB = 2**20
GB = 10**9
Case = dict[str, Any]
Document = dict[str, Any]


def machine_line(document: Document) -> str:
    """Where and when it was measured."""
    facts = document["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (f"{facts['cpu']}, {facts['num_cores']} cores, {facts['memory_nbytes'] / 2**30:.1f} GiB of memory, "
            f"{facts['file_system']}, Linux {facts['kernel']}, Python {facts['python']}, {packages}; commit "
            f"{facts['commit']}, {facts['date']}.")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`min / median / max`, or one number where there is one."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def mib(values: Sequence[int]) -> str:
    """The highest, in MiB."""
    return f"{max(values) / MIB:,.0f}" if values else "-"


def times(case: Case, *counters: str) -> str:
    """Bytes as multiples of the source: median over the rounds."""
    return " / ".join(f"{median(moved[counter] for moved in case['bytes']) / case['source_nbytes']:.2f}"
                      for counter in counters) if case["bytes"] else "-"


def told(case: Case, key: str) -> str:
    """A size that the tool itself printed, in MiB; cp prints none."""
    if not case.get("is_ours"):
        return "-"
    return f"{case['told'][key] / MIB:,.0f}" if key in case["told"] else "not told"


Column = tuple[str, Callable[[Case], str]]
NAME: Column = ("", lambda case: f"**{case['name']}**" if case.get("is_ours") else case["name"])
RATIO: Column = ("time, x of cp", lambda case: spread(case["ratios"]))
SIZE: Column = ("source, GB", lambda case: f"{case['source_nbytes'] / GB:.2f}")
SECONDS: Column = ("seconds", lambda case: f"{median(case['seconds']):.2f}")
RSS: Column = ("peak RSS, MiB", lambda case: mib(case["peak_rss"]))
ANON: Column = ("of it anonymous", lambda case: mib(case["peak_anon"]))
DISK: Column = ("from disk / to disk", lambda case: times(case, "read_bytes", "write_bytes"))
CALLS: Column = ("read / written by calls", lambda case: times(case, "rchar", "wchar"))
COMMON = (NAME, RATIO, SECONDS, RSS, ANON, DISK)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "peers": COMMON,
    "speed": (*COMMON, CALLS),
    "groups": (NAME, ("finished", lambda case: "yes"), ("time, x of no group", RATIO[1]), *COMMON[2:]),
    "options": COMMON,
    "clones": (*COMMON[:-1], *((f"{word}, MiB", lambda case, key=key: told(case, key)) for word, key in (
                  ("cloned", "nbytes_cloned"), ("copied", "nbytes_copied"), ("rearranged", "nbytes_strided"))),
               ("disk used, MiB", lambda case: mib(case["used_nbytes"]))),
    "growth": (NAME, SIZE, *COMMON[1:]),
    "training": (NAME, SIZE, *COMMON[1:], ("disk at most, x of source", lambda case: spread(
        [max(case["peak_disk"]) / case["source_nbytes"]]))),
    "ways": (NAME, SIZE, ("time, x of cp or cat", RATIO[1]),
             ("x of the limit", lambda case: spread(case["limit_ratios"])), *COMMON[2:]),
}

ABOUT = {
    "peers": "stream_reshard at TP=4 PP=2 with --max-memory 256MiB, and others with the same weights. Cold source, "
             "durable output. Ratio to `cp -r SRC OUT && sync`.",
    "speed": "stream_reshard and cp. Ratio to `cp -r SRC OUT && sync` in the same state of the cache.",
    "groups": "TP=4 PP=2 inside a memory control group that counts the page cache, --max-memory equal to its limit. "
              "Cold source. stream_reshard: ratio to its own run in no group, with --max-memory 256MiB; cp: to cp in "
              "none.",
    "options": "Variants of stream_reshard at TP=4 PP=2, --max-memory 256MiB. Cold source. Ratio to "
               "`cp -r SRC OUT && sync`. On fewer than 16 cores `default` and `--workers 1` are the same run: they "
               "show the noise, and a variant within their range is no faster or slower.",
    "clones": "File systems that share blocks, each in a file on a loop device. Cold source. Ratio to "
              "`cp --reflink=never -r SRC OUT && sync` on the same file system. Cloned, copied, rearranged: target "
              "bytes, as the tool tells; disk used: what the file system holds more after the run.",
    "growth": "Time and memory against the size of the model and against TP. Cold source. Ratio to "
              "`cp -r SRC OUT && sync` of the same source.",
    "ways": "Every way of stream_reshard with the default --max-memory. Cold source, durable output. Ratio to "
            "`cp -r SRC OUT && sync` of the same source, of a comparison to `cat` of both; and to the limit: a bare "
            "loop that moves the same bytes, file for file, with no plan and no digests. Sources: Hugging Face, or cut "
            "for Nanotron TP=4 PP=2.",
    "training": "A whole training of Nanotron moves to another topology: stream_reshard with --max-memory 256MiB, and "
                "a script with torch that loads every rank file, joins, cuts and saves. The nearest thing elsewhere: "
                "DeepSpeed's ds_to_universal, on a ZeRO-1 checkpoint of as many parameters at TP=2 DP=2. Cold source, "
                "durable output. Ratio to `cp -r SRC OUT && sync` of the same source. Disk at most: what the output "
                "and all beside it held while the tool ran.",
}

CONTENT = {"training": "of weights in bfloat16, moments and masters in float32"}
"""What a source holds, where that is not bfloat16 alone."""


def rows_of(document: Document) -> Iterator[str]:
    """The table."""
    columns = COLUMNS[document["section"]]
    yield "| " + " | ".join(title for title, _ in columns) + " |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for case in document["cases"]:
        if case["status"] != "ok":
            cells = [NAME[1](case), case["status"].replace("|", "/")] + [""] * (len(columns) - 2)
        else:
            cells = [cell(case) for _, cell in columns]
        yield "| " + " | ".join(cells) + " |"


def table_of(document: Document) -> str:
    """The table alone."""
    return "\n".join(rows_of(document)) + "\n"


def notes_of(document: Document) -> Iterator[str]:
    """What a reader needs to understand the table."""
    shape = "" if document["section"] == "growth" else (
        f" {document['shape']}, {document['cases'][0]['source_nbytes'] / GB:.2f} GB "
        f"{CONTENT.get(document['section'], 'of bfloat16')}.")
    yield ABOUT[document["section"]] + shape
    rehearsed = "Each round begins with an unrecorded run of the references. " if document.get("is_rehearsed") else ""
    yield (f"{document['num_rounds']} interleaved rounds; ratios are taken within a round and given as min / median / "
           f"max; seconds and bytes: median; memory: highest of all rounds, summed over the process tree. Bytes: "
           f"multiples of the source. {rehearsed}Caches before each run: {document['machine']['caches']}.")
    yield from fits_of(document)
    yield machine_line(document)


def fits_of(document: Document) -> Iterator[str]:
    """The line through the runs, in words."""
    if document["section"] == "growth" and (fit := of_growth(document["cases"])):
        yield (f"Fit, stream_reshard at TP=4 PP=2: seconds = {fit['intercept']:.3f} + {fit['slope']:.3f} * GB "
               f"(R² = {fit['r2']:.4f}, {fit['num_points']} runs).")


def markdown_of(document: Document) -> str:
    """The whole file."""
    return "\n".join([f"# {document['section']}\n", table_of(document), *(f"{note}\n" for note in notes_of(document))])
