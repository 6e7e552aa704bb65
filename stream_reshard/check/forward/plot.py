"""The differences of all layers as a picture."""
from __future__ import annotations

import io
import math
from pathlib import Path

from stream_reshard.check.forward.result import Comparison, StepDifference
from stream_reshard.storage.durable import NewFile, make_folder, target_error
from stream_reshard.storage.folder import Folder

_FLOOR = 1e-9
"""Value at which smaller differences are drawn, zero included."""


def draw(comparison: Comparison, path: Path) -> None:
    """Relative difference by layer, on a logarithmic scale, with the tolerance and the first layer beyond it; a PNG at
    `path`, whole or not at all. Raises DestinationError or ResourceError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    values = [*(_drawn(row.output.relative) for row in comparison.rows), _drawn(comparison.logits.relative)]
    axes.semilogy(range(len(values)), values, marker="o", markersize=3, linewidth=1, label="DST against SRC")
    axes.axhline(comparison.tolerance, linestyle="--", linewidth=1, color="grey", label="tolerance")
    begin = next((place for place, row in enumerate(comparison.rows) if row.first), None)
    if begin is not None and comparison.first is not None:
        axes.axvline(begin, color="tab:red", linewidth=1, label=f"begins at {comparison.first.title}")
    step = max(1, len(values) // 12)
    names = [*map(_name, comparison.rows), "logits"]
    places = sorted({0, len(values) - 1, *range(1, len(values) - 2, step)})
    axes.set_xticks(places, [names[place] for place in places], rotation=45, ha="right", fontsize=7)
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
