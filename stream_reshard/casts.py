"""Casts between the dtypes of weights, by torch: round to nearest even, as it does everywhere else."""
from __future__ import annotations

from stream_reshard.errors import UsageError
from stream_reshard.layouts.base import TORCH_DTYPES


def cast(view: memoryview, source: str, target: str) -> memoryview:
    """The elements in `view` in another dtype; `view` itself where the dtypes agree (torch is not imported then)."""
    if source == target:
        return view
    torch = import_torch()
    tensor = torch.frombuffer(view, dtype=getattr(torch, TORCH_DTYPES[source]))
    other = tensor.to(getattr(torch, TORCH_DTYPES[target]))
    return memoryview(other.view(torch.uint8).numpy())


def num_overflowed(before: memoryview, source: str, after: memoryview, target: str) -> int:
    """How many finite elements a cast made infinite: float16 ends at 65504."""
    if source == target:
        return 0
    torch = import_torch()
    infinite = torch.isinf(torch.frombuffer(after, dtype=getattr(torch, TORCH_DTYPES[target])))
    if not infinite.any():
        return 0
    return int((infinite & torch.isfinite(torch.frombuffer(before, dtype=getattr(torch, TORCH_DTYPES[source])))).sum())


def import_torch(what: str = "casting weights", instead: str = ""):
    """The torch module. Raises UsageError with the cure where it is not installed: `what` needs it, `instead` says
    what to do without."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{what} needs torch: pip install 'stream_reshard[torch]'{instead}") from error
    return torch
