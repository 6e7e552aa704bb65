"""A picture of the differences of all layers."""
from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from stream_reshard.check.forward.result import Comparison, StepDifference
from stream_reshard.storage.durable import NewFile, make_folder, target_error
from stream_reshard.storage.folder import Folder

_MAX_TICKS = 14
"""Steps that are named below the picture."""


def draw(comparison: Comparison, names: tuple[str, str], path: Path) -> None:
    """Write a PNG with the relative difference of each layer on a logarithmic scale, the tolerance, and the first layer
    beyond it; a difference of zero is a mark at the bottom, as it has no logarithm. `names`: names of the folders of
    SRC and DST. Raises DestinationError or ResourceError if it cannot be written; then no file is left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    values = [*(_drawn(row.output.relative) for row in comparison.rows), _drawn(comparison.logits.relative)]
    drawn = [value if value > 0 else math.nan for value in values]
    axes.plot(range(len(values)), drawn, marker="o", markersize=3, linewidth=1, label="difference")
    axes.axhline(comparison.tolerance, linestyle="--", linewidth=1, color="grey", label="tolerance")
    if zeros := [index for index, value in enumerate(values) if value == 0]:
        axes.plot(zeros, [0] * len(zeros), marker="v", markersize=4, linestyle="none", color="tab:green",
                  transform=axes.get_xaxis_transform(), clip_on=False, label="equal")
    for index, row in enumerate(comparison.rows):
        if row.first:
            axes.axvline(index, color="tab:red", linewidth=1, label=f"begins at {row.first.title}")
            break
    _name_steps(axes, [*map(_name, comparison.rows), "logits"])
    axes.set_title(f"{names[1]} against {names[0]}, {comparison.num_tokens} tokens", fontsize=9)
    axes.set_xlabel("output of embedding, layer by number, final norm, logits", fontsize=8)
    axes.set_ylabel("largest difference of a token,\nrelative to its largest value", fontsize=8)
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


def _name_steps(axes: Any, names: list[str]) -> None:
    """Ticks for the first, the last two and the logits, and evenly between them."""
    step = max(1, -(-len(names) // _MAX_TICKS))
    ticks = sorted({0, *range(1, len(names) - 2, step), len(names) - 2, len(names) - 1})
    axes.set_xticks(ticks, [names[tick] for tick in ticks], rotation=45, ha="right", fontsize=7)


def _name(row: StepDifference) -> str:
    return row.output.title if row.output.layer is None else str(row.output.layer)


def _drawn(value: float) -> float:
    return value if math.isfinite(value) else 1e3
