"""Straight lines through what was measured."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GB = 10**9
SWEPT = "llama-1.3b"
"""The shape for which TP is varied."""


def line(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Least squares y = intercept + slope * x, with R²."""
    import numpy as np
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - intercept - slope * x) ** 2).sum()
    return {"intercept": round(float(intercept), 4), "slope": round(float(slope), 4),
            "r2": round(float(1 - rest / ((y - y.mean()) ** 2).sum()), 5), "num_points": len(points)}


def of_growth(cases: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds of this tool at TP=4 against GB of the source; every run is a point. None with fewer than three sizes.

    There is no line through the runs of cp, whose time bends where the page cache is full, nor through those by TP,
    which vary more from round to round than from one TP to the next.
    """
    points = [(case["source_nbytes"] / GB, seconds) for case in cases if case.get("is_ours") and case["tp"] == 4
              for seconds in case["seconds"]]
    return line(points) if len({x for x, _ in points}) > 2 else None
