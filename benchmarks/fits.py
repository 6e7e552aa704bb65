"""Straight lines through what was measured."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GB = 10**9
OURS, COPY, SWEPT = "stream_reshard, TP=4", "cp -r && sync", "llama-1.3b"
BY_TP = f"stream_reshard, {SWEPT}"
"""Names of the lines; the shape for which TP is varied."""


def line(points: Sequence[tuple[float, float]], unit: str) -> dict[str, Any]:
    """Least squares y = intercept + slope * x, with R²; `unit` is that of x."""
    import numpy as np
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - intercept - slope * x) ** 2).sum()
    return {"intercept": round(float(intercept), 4), "slope": round(float(slope), 4), "unit": unit,
            "r2": round(float(1 - rest / ((y - y.mean()) ** 2).sum()), 5), "num_points": len(points)}


def of_growth(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Seconds against GB of the source (this tool at TP=4, and cp), and against TP; every run is a point."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in cases:
        for seconds in case["seconds"]:
            if not case.get("is_ours"):
                points.setdefault((COPY, "GB"), []).append((case["source_nbytes"] / GB, seconds))
                continue
            if case["tp"] == 4:
                points.setdefault((OURS, "GB"), []).append((case["source_nbytes"] / GB, seconds))
            if case["shape"] == SWEPT:
                points.setdefault((BY_TP, "TP"), []).append((case["tp"], seconds))
    return {name: line(found, unit) for (name, unit), found in points.items() if len({x for x, _ in found}) > 1}
