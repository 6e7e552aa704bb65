"""Results as pictures (matplotlib, Agg, colours of Okabe and Ito, which the colour-blind can tell apart).

Every round is drawn, so a reader sees how many there are. A panel has one baseline, named on its axis.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fits import GB, SWEPT, of_growth
from stream_reshard.machine.memory import default_workers

MIB = 2**20
_OURS, _COPY, _LIMIT = "#0072B2", "#777777", "#D55E00"
_COLOURS = ("#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "oD^svPX"
_LEGEND_BESIDE = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
Case = dict[str, Any]
Document = dict[str, Any]


def _figure(document: Document, size: tuple[float, float], num_rows: int = 1, num_columns: int = 1,
            heights: Sequence[float] | None = None) -> tuple[Any, list[Any]]:
    """A figure and its panels; below them, where and how often it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=heights).flat)
    for panel in panels:
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_caption(document), fontsize=8, color="#444444")
    return figure, panels


def _caption(document: Document) -> str:
    facts = document["machine"]
    shape = "" if document["section"] == "growth" else f"{document['shape']}; "
    return (f"{shape}{_rounds(document)}; {facts['cpu']}, {facts['num_cores']} cores, "
            f"{facts['memory_nbytes'] / 2**30:.0f} GiB, {facts['file_system']}; commit {facts['commit']}, "
            f"{facts['date']}")


def _rounds(document: Document) -> str:
    number = document["num_rounds"]
    return f"n = {number} round{'s' * (number != 1)}"


def _finished(document: Document) -> list[Case]:
    return [case for case in document["cases"] if case["status"] == "ok"]


def _is_copy(case: Case) -> bool:
    return "cp" in case["name"].split()


def _look(index: int, case: Case) -> dict[str, Any]:
    """One colour for this tool and one for cp in all pictures; the others by their place."""
    other = _COPY if _is_copy(case) else _COLOURS[index % len(_COLOURS)]
    return {"color": _OURS if case.get("is_ours") else other, "linewidth": 2.6 if case.get("is_ours") else 1.4,
            "zorder": 3 if case.get("is_ours") else 2}


def memory_over_time(document: Document) -> Any:
    """Resident memory of every method during its run, the `sync` after it, and the limit that was given to ours."""
    figure, (panel,) = _figure(document, (10.5, 5))
    for index, case in enumerate(_finished(document)):
        look = _look(index, case)
        seconds, rss, _ = zip(*(point for point in case["series"] if point[1] >= MIB))
        panel.plot(seconds, [nbytes / MIB for nbytes in rss], label=case["name"], **look)
        if case["needs_sync"]:
            panel.plot([seconds[-1], case["seconds"][-1]], [rss[-1] / MIB] * 2, **look | {"linestyle": "--"})
    limit = next(case["limit_nbytes"] for case in document["cases"] if case.get("is_ours"))
    panel.axhline(limit / MIB, color="#444444", linestyle=":", linewidth=1.4,
                  label=f"the limit given to stream_reshard, {limit / MIB:.0f} MiB")
    panel.plot([], [], color="#444444", linestyle="--", linewidth=1.4, label="`sync` after the tool has ended")
    panel.set_yscale("log")
    panel.set(xlabel=f"seconds (one run, the last of {document['num_rounds']})", xlim=(0, None), ylim=(1, None),
              ylabel="resident memory of the process tree, MiB", title="Memory over time, until the output is durable")
    _plain(panel.yaxis)
    panel.legend(**_LEGEND_BESIDE)
    return figure


def _plain(axis: Any) -> None:
    """Plain numbers on a log axis."""
    from matplotlib.ticker import FuncFormatter
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def time_against_memory(document: Document) -> Any:
    """One point per method: median ratio to cp, peak of memory; lines from the fastest to the slowest round."""
    figure, (panel,) = _figure(document, (10.5, 5))
    for index, case in enumerate(_finished(document)):
        ratios, peak, look = case["ratios"], max(case["peak_rss"]) / MIB, _look(index, case)
        panel.plot([min(ratios), max(ratios)], [peak, peak], **look | {"linewidth": 1.4})
        panel.plot(median(ratios), peak, marker=_MARKERS[index % len(_MARKERS)], linestyle="none",
                   markersize=9 if case.get("is_ours") else 7, label=case["name"], **look)
    panel.axvline(1, color="#444444", linestyle=":", linewidth=1.4)
    panel.set_yscale("log")
    panel.set(xlabel=f"time, as a multiple of `cp -r SRC OUT && sync` (median and range of {_rounds(document)})",
              xlim=(0, None), ylim=(1, None), ylabel="peak resident memory of the process tree, MiB",
              title="Time against memory")
    _plain(panel.yaxis)
    panel.legend(**_LEGEND_BESIDE)
    return figure


def _dots(panel: Any, row: float, values: Sequence[float], colour: str, marker: str = "o") -> None:
    """Every round as an open mark; of several, the median as a filled one and a line from the least to the most."""
    if len(values) > 1:
        panel.plot([min(values), max(values)], [row, row], color=colour, linewidth=1.2)
        panel.plot(median(values), row, marker, color=colour, markersize=8)
    panel.plot(values, [row] * len(values), marker, linestyle="none", color=colour, markerfacecolor="white",
               markersize=5, label="rounds")


def _key(panel: Any, marks: Sequence[tuple[str, str, str]], num_rounds: int) -> None:
    """A legend of (text, colour, marker), and of open and filled marks."""
    from matplotlib.lines import Line2D
    look: dict[str, Any] = {"linestyle": "none"}
    handles = [Line2D([], [], color=colour, marker=marker, markersize=8, label=text, **look)
               for text, colour, marker in marks]
    handles.append(Line2D([], [], color="#444444", marker="o", markersize=5, markerfacecolor="white",
                          label="one round", **look))
    if num_rounds > 1:
        handles.append(Line2D([], [], color="#444444", marker="o", markersize=8, label="median of the rounds", **look))
    panel.legend(handles=handles, **_LEGEND_BESIDE)


def _rows(panel: Any, names: Sequence[str], baseline: str, most: float) -> None:
    """A row for each name, the first one on top, and the line of the baseline. `most`: the highest value."""
    panel.set_yticks(range(len(names)), names)
    panel.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, max(most, 1) * 1.05),
              xlabel=f"time, as a multiple of {baseline}")
    panel.axvline(1, color="#444444", linestyle=":", linewidth=1.4)


def ratios(document: Document) -> Any:
    """A row per case, and a panel per baseline, whose own ratio is 1 by definition."""
    by_reference: dict[str, list[Case]] = {}
    for case in _finished(document):
        if case["name"] != case["reference"]:
            by_reference.setdefault(case["reference"], []).append(case)
    heights = [len(cases) + 1.5 for cases in by_reference.values()]
    figure, panels = _figure(document, (10.5, 1.1 + 0.33 * sum(heights)), len(heights), heights=heights)
    most = max(ratio for cases in by_reference.values() for case in cases for ratio in case["ratios"])
    for panel, (reference, cases) in zip(panels, by_reference.items()):
        for row, case in enumerate(cases):
            _dots(panel, row, case["ratios"], _OURS if case.get("is_ours") else _COPY)
        _rows(panel, [case["name"] for case in cases], reference, most)
    kinds = {bool(case.get("is_ours")) for cases in by_reference.values() for case in cases}
    _key(panels[0], [(text, colour, "o") for text, colour, is_ours in (
        ("stream_reshard", _OURS, True), ("cp", _COPY, False)) if is_ours in kinds], document["num_rounds"])
    panels[0].set_title(_TITLES[document["section"]])
    return figure


_TITLES = {"speed": "Topologies and limits on memory, cold and warm",
           "groups": "Inside control groups, each tool against its own run outside of any",
           "options": "Variants of stream_reshard", "clones": "File systems that share blocks"}


def options(document: Document) -> Any:
    """`ratios`, with the range of runs that do not differ: by default there is one worker on few cores."""
    figure, cases = ratios(document), {case["name"]: case for case in _finished(document)}
    same = [case for name in ("default", "--workers 1") if (case := cases.get(name))]
    if default_workers(same[0]["limit_nbytes"], document["machine"]["num_cores"]) == 1 and len(same) == 2:
        values = [ratio for case in same for ratio in case["ratios"]]
        figure.axes[0].axvspan(min(values), max(values), color="#56B4E9", alpha=0.25, linewidth=0)
        figure.axes[0].set_title(f"{_TITLES['options']} (shaded: noise, the range of `default` and `--workers 1`,\n"
                                 "which are the same run on this machine)", fontsize=10)
    return figure


def growth(document: Document) -> Any:
    """Seconds and memory against size, seconds against TP; every run is a point."""
    figure, (left, middle, right) = _figure(document, (13.2, 4.7), num_columns=3)
    cases = _finished(document)
    ours = [case for case in cases if case.get("is_ours") and case["tp"] == 4]
    copies = [case for case in cases if not case.get("is_ours")]
    for name, chosen, colour, marker in (
            ("stream_reshard, TP=4 PP=2, every run", ours, _OURS, "o"),
            ("cp -r && sync, every run: no line, it bends\nwhere the page cache is full", copies, _COPY, "^")):
        _points(left, [(c["source_nbytes"] / GB, s) for c in chosen for s in c["seconds"]], colour, marker, name)
    if fit := of_growth(cases):
        ends = [0, max(case["source_nbytes"] / GB for case in ours)]
        left.plot(ends, [fit["intercept"] + fit["slope"] * end for end in ends], color=_OURS, linewidth=1,
                  label=f"{fit['intercept']:.2f} s + {fit['slope']:.2f} s/GB (R² = {fit['r2']:.3f})")
    left.set(xlabel="source, GB", ylabel="seconds", title="Time against size")
    _points(middle, [(c["source_nbytes"] / GB, max(c["peak_rss"]) / MIB) for c in ours], _OURS, "o",
            "stream_reshard, TP=4 PP=2, highest of all rounds")
    middle.axhline(ours[0]["limit_nbytes"] / MIB, color="#444444", linestyle=":", linewidth=1.4,
                   label="the limit it was given")
    middle.set(xlabel="source, GB", ylabel="peak resident memory, MiB", title="Memory against size")
    swept = [case for case in cases if case.get("is_ours") and case["shape"] == SWEPT]
    _points(right, [(c["tp"], s) for c in swept for s in c["seconds"]], _OURS, "o",
            f"stream_reshard, {SWEPT}, every run")
    right.set(xlabel="TP (PP=2)", ylabel="seconds", xticks=[c["tp"] for c in swept], title="Time against TP")
    for panel in (left, middle, right):
        panel.set(xlim=(0, None), ylim=(0, panel.get_ylim()[1] * 1.25))
        panel.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _points(panel: Any, points: Sequence[tuple[float, float]], colour: str, marker: str, name: str) -> None:
    panel.plot(*zip(*points), linestyle="none", marker=marker, markersize=6, markerfacecolor="none", color=colour,
               label=name)


def ways(document: Document) -> Any:
    """A row per way: its time as a multiple of cp (of cat, where it only reads) and of the limit."""
    cases = [case for case in _finished(document) if case.get("is_ours")]
    figure, (panel,) = _figure(document, (10.5, 1.6 + 0.42 * len(cases)))
    for row, case in enumerate(cases):
        _dots(panel, row - 0.14, case["ratios"], _OURS)
        _dots(panel, row + 0.14, case["limit_ratios"], _LIMIT, "D")
    most = max(ratio for case in cases for ratio in (*case["ratios"], *case["limit_ratios"]))
    _rows(panel, [case["name"] for case in cases], "its baseline, which moves the same source", most)
    _key(panel, [("of `cp -r SRC OUT && sync`\n(verify: of `cat` of both)", _OURS, "o"),
                 ("of the limit: a bare loop", _LIMIT, "D")], document["num_rounds"])
    panel.set_title("Every way of stream_reshard against cp and against the limit")
    return figure


PICTURES: dict[str, dict[str, Callable[[Document], Any]]] = {
    "peers": {"": time_against_memory, "_memory": memory_over_time}, "growth": {"": growth}, "speed": {"": ratios},
    "groups": {"": ratios}, "options": {"": options}, "clones": {"": ratios}, "ways": {"": ways},
    "training": {"": time_against_memory}}
"""Per section: pictures by what is added to the name of the file."""


def draw(document: Document, base: Path) -> list[Path]:
    """Write the pictures of a section beside its JSON. Raises ImportError without matplotlib."""
    paths = []
    for suffix, picture in PICTURES[document["section"]].items():
        paths.append(base.with_name(f"{base.name}{suffix}.png"))
        picture(document).savefig(paths[-1], metadata={"Software": None})
    return paths
