"""Dtypes of weights, and casts between them by torch, which rounds to nearest even."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_reshard.errors import UsageError

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
"""Bytes per element of every dtype with whole bytes, by its safetensors name."""

TORCH_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The dtypes that weights may have: from names of safetensors to names of torch, Hugging Face and Nanotron."""

SAFETENSORS_DTYPES: Mapping[str, str] = {torch: name for name, torch in TORCH_DTYPES.items()}
"""From names of torch to names of safetensors."""


def cast(view: memoryview, source: str, target: str) -> memoryview:
    """The elements of `view`, cast; `view` itself if the dtypes agree (torch is not imported then)."""
    if source == target:
        return view
    torch = import_torch()
    tensor = torch.frombuffer(view, dtype=getattr(torch, TORCH_DTYPES[source]))
    result = tensor.to(getattr(torch, TORCH_DTYPES[target]))
    return memoryview(result.view(torch.uint8).numpy())


def num_overflowed(before: memoryview, source: str, after: memoryview, target: str) -> int:
    """Number of finite elements that a cast made infinite: the largest float16 is 65504."""
    if source == target:
        return 0
    torch = import_torch()
    infinite = torch.isinf(torch.frombuffer(after, dtype=getattr(torch, TORCH_DTYPES[target])))
    if not infinite.any():
        return 0
    return int((infinite & torch.isfinite(torch.frombuffer(before, dtype=getattr(torch, TORCH_DTYPES[source])))).sum())


def import_torch(what: str = "casting weights", instead: str = "") -> Any:
    """The torch module. Raises UsageError if it is not installed; `what` is the work that needs it, `instead` another
    cure than to install it."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{what} needs torch: pip install 'stream_reshard[torch]'{instead}") from error
    return torch
