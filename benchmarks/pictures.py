"""Results as pictures (matplotlib, Agg, colours of Okabe and Ito, which the colour-blind can tell apart)."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fits import BY_TP, COPY, GB, OURS, SWEPT

MIB = 2**20
_OURS, _COPY = "#0072B2", "#888888"
_COLOURS = ("#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "oD^svPX"
Document = dict[str, Any]


def _figure(num_panels: int = 1, height: float = 4.5) -> tuple[Any, list[Any]]:
    """A figure and its panels, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5 if num_panels == 1 else 4.4 * num_panels, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for panel in panels:
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _caption(document: Document) -> str:
    facts = document["machine"]
    shape = "" if document["section"] == "growth" else f"{document['shape']}, "
    return (f"{shape}{facts['num_cores']} cores, {facts['memory_nbytes'] / 2**30:.0f} GiB, "
            f"{facts['file_system']}, {facts['date']}")


def _finished(document: Document) -> list[dict[str, Any]]:
    return [case for case in document["cases"] if case["status"] == "ok"]


def _look(index: int, case: dict[str, Any]) -> dict[str, Any]:
    """One colour for this tool and one for cp in all pictures; the others by their place."""
    other = _COPY if "cp" in case["name"].split() else _COLOURS[index % len(_COLOURS)]
    return {"color": _OURS if case.get("is_ours") else other, "linewidth": 2.6 if case.get("is_ours") else 1.4,
            "zorder": 3 if case.get("is_ours") else 2}


def memory_over_time(document: Document) -> Any:
    """Resident memory of every method during its run, and the limit that was given to ours."""
    figure, (panel,) = _figure()
    for index, case in enumerate(_finished(document)):
        seconds, rss, _ = zip(*(point for point in case["series"] if point[1] >= MIB))
        panel.plot(seconds, [nbytes / MIB for nbytes in rss], label=case["name"], **_look(index, case))
    limit = next(case["limit_nbytes"] for case in document["cases"] if case.get("is_ours"))
    panel.axhline(limit / MIB, color="#666666", linestyle="--", linewidth=1)
    panel.text(0.99, limit / MIB * 0.93, f"limit given to stream_reshard: {limit / MIB:.0f} MiB", ha="right", va="top",
               color="#444444", fontsize=9, transform=panel.get_yaxis_transform())
    panel.set_yscale("log")
    panel.set(xlabel="seconds (last round; the `sync` that the others need is not shown)", xlim=(0, None),
              ylim=(1, None), ylabel="resident memory of the process tree, MiB",
              title=f"Memory over time: {_caption(document)}")
    _plain(panel.yaxis)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.set_size_inches(10.5, 4.8)
    return figure


def _plain(axis: Any) -> None:
    """Plain numbers on a log axis."""
    from matplotlib.ticker import FuncFormatter
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def time_against_memory(document: Document) -> Any:
    """One point per method: median ratio to cp, peak of memory; whiskers over the rounds."""
    figure, (panel,) = _figure()
    for index, case in enumerate(_finished(document)):
        ratios, peak = case["ratios"], max(case["peak_rss"]) / MIB
        middle = median(ratios)
        panel.errorbar(middle, peak, xerr=[[middle - min(ratios)], [max(ratios) - middle]], capsize=3,
                       marker=_MARKERS[index % len(_MARKERS)], markersize=10 if case.get("is_ours") else 7,
                       linestyle="none", label=case["name"], **_look(index, case))
    panel.set_yscale("log")
    panel.set(xlabel="time, as a multiple of `cp -r && sync` (median; bars: min and max)", xlim=(0, None),
              ylabel="peak resident memory, MiB", title=f"Time against memory: {_caption(document)}")
    _plain(panel.yaxis)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.set_size_inches(10.5, 4.8)
    return figure


def ratios(document: Document) -> Any:
    """A bar per case: median ratio, whiskers from min to max."""
    cases = _finished(document)[::-1]
    figure, (panel,) = _figure(height=1.4 + 0.32 * len(cases))
    middles = [median(case["ratios"]) for case in cases]
    spreads = [[m - min(c["ratios"]) for m, c in zip(middles, cases)],
               [max(c["ratios"]) - m for m, c in zip(middles, cases)]]
    panel.barh([case["name"] for case in cases], middles, xerr=spreads, capsize=3,
               color=[_OURS if case.get("is_ours") else _COPY for case in cases])
    panel.axvline(1, color="#444444", linestyle="--", linewidth=1)
    panel.set(xlabel="time, ratio (median; bars: min and max)", title=f"{document['section']}: {_caption(document)}")
    return figure


def growth(document: Document) -> Any:
    """Seconds and memory against size, seconds against TP, with the fits."""
    figure, (left, middle, right) = _figure(3)
    cases = _finished(document)
    ours = [case for case in cases if case.get("is_ours") and case["tp"] == 4]
    copies = [case for case in cases if not case.get("is_ours")]
    for name, chosen, look in ((OURS, ours, _look(0, ours[0])), (COPY, copies, _look(0, copies[0]))):
        _fitted(left, document, name, [(c["source_nbytes"] / GB, s) for c in chosen for s in c["seconds"]], look)
    left.set(xlabel="source, GB", ylabel="seconds", title="time against size")
    middle.plot([c["source_nbytes"] / GB for c in ours], [max(c["peak_rss"]) / MIB for c in ours], marker="o",
                label="stream_reshard, TP=4, peak", **_look(0, ours[0]))
    middle.axhline(ours[0]["limit_nbytes"] / MIB, color="#666666", linestyle="--", linewidth=1,
                   label="the limit it was given")
    middle.set(xlabel="source, GB", ylabel="resident memory, MiB", title="memory against size")
    swept = [case for case in cases if case.get("is_ours") and case["shape"] == SWEPT]
    _fitted(right, document, BY_TP, [(c["tp"], s) for c in swept for s in c["seconds"]], _look(0, ours[0]))
    right.set(xlabel="TP (PP=2)", ylabel="seconds", xticks=[c["tp"] for c in swept], title="time against TP")
    for panel in (left, middle, right):
        panel.set(xlim=(0, None), ylim=(0, None))
        panel.legend(fontsize=8, frameon=False, loc="best")
    figure.suptitle(_caption(document), fontsize=9, color="#444444")
    return figure


def _fitted(panel: Any, document: Document, name: str, points: list[tuple[float, float]], look: dict[str, Any]) -> None:
    """Runs as points, and the line through them where there is one."""
    panel.plot(*zip(*points), linestyle="none", marker="o", markersize=5, color=look["color"],
               label=f"{name}, every run")
    if fit := document["fits"].get(name):
        ends = [0, max(x for x, _ in points)]
        panel.plot(ends, [fit["intercept"] + fit["slope"] * end for end in ends], color=look["color"], linewidth=1,
                   label=f"{fit['intercept']:.2f} + {fit['slope']:.2f} {fit['unit']}  (R² {fit['r2']:.3f})")


PICTURES: dict[str, dict[str, Callable[[Document], Any]]] = {
    "peers": {"": time_against_memory, "_memory": memory_over_time}, "growth": {"": growth}, "speed": {"": ratios},
    "groups": {"": ratios}, "options": {"": ratios}, "clones": {"": ratios}}
"""Per section: pictures by what is added to the name of the file."""


def draw(document: Document, base: Path) -> list[Path]:
    """Write the pictures of a section beside its JSON. Raises ImportError without matplotlib."""
    paths = []
    for suffix, picture in PICTURES[document["section"]].items():
        paths.append(base.with_name(f"{base.name}{suffix}.png"))
        picture(document).savefig(paths[-1], metadata={"Software": None})
    return paths
