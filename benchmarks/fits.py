"""Straight lines through what was measured."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GB = 10**9


def line(points: Sequence[tuple[float, float]], unit: str) -> dict[str, Any]:
    """Least squares y = intercept + slope * x, with R²; `unit` is that of x."""
    import numpy as np
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - intercept - slope * x) ** 2).sum()
    return {"intercept": round(float(intercept), 4), "slope": round(float(slope), 4), "unit": unit,
            "r2": round(float(1 - rest / ((y - y.mean()) ** 2).sum()), 5), "num_points": len(points)}


def seconds_by_size(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Seconds against GB of the source, every run a point: this tool at TP=4, and cp; none for a single size."""
    points: dict[str, list[tuple[float, float]]] = {"stream_reshard": [], "cp -r && sync": []}
    for case in cases:
        if case.get("tp", 4) == 4:
            name = "stream_reshard" if case.get("is_ours") else "cp -r && sync"
            points[name] += [(case["source_nbytes"] / GB, seconds) for seconds in case["seconds"]]
    return {f"{name}": line(p, "GB of source, in seconds") for name, p in points.items() if len({x for x, _ in p}) > 1}
