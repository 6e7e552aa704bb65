"""A picture of the differences of all layers."""
from __future__ import annotations

import io
import math
from pathlib import Path

from stream_reshard.check.forward.result import Comparison, StepDifference
from stream_reshard.storage.durable import NewFile, make_folder, target_error
from stream_reshard.storage.folder import Folder

_FLOOR = 1e-9
"""Smallest value that is drawn; smaller differences, zero included, are drawn as this."""


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG with the relative difference of each layer on a logarithmic scale, the tolerance, and the first layer
    beyond it. Raises DestinationError or ResourceError if it cannot be written; then no file is left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    values = [*(_drawn(row.output.relative) for row in comparison.rows), _drawn(comparison.logits.relative)]
    axes.semilogy(range(len(values)), values, marker="o", markersize=3, linewidth=1, label="DST against SRC")
    axes.axhline(comparison.tolerance, linestyle="--", linewidth=1, color="grey", label="tolerance")
    for index, row in enumerate(comparison.rows):
        if row.first:
            axes.axvline(index, color="tab:red", linewidth=1, label=f"begins at {row.first.title}")
            break
    step = max(1, len(values) // 12)
    names = [*map(_name, comparison.rows), "logits"]
    ticks = sorted({0, len(values) - 1, *range(1, len(values) - 2, step)})
    axes.set_xticks(ticks, [names[tick] for tick in ticks], rotation=45, ha="right", fontsize=7)
    axes.set_ylabel("largest relative difference")
    axes.legend(fontsize=7)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    content = picture.getbuffer()
    try:
        make_folder(path.parent)
        folder = Folder(path.parent.resolve())
    except OSError as error:
        raise target_error(path, error) from error
    with NewFile(folder, path.name, len(content), is_digested=False) as file:
        file.write(0, [content])
        file.commit()


def _name(row: StepDifference) -> str:
    return row.output.title if row.output.layer is None else str(row.output.layer)


def _drawn(value: float) -> float:
    return max(value, _FLOOR) if math.isfinite(value) else 1e3
