"""Dtypes of weights."""
from __future__ import annotations

from collections.abc import Mapping

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
"""Bytes per element of every dtype with whole bytes, by its safetensors name."""

TORCH_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The dtypes that weights may have: from names of safetensors to names of torch, Hugging Face and Nanotron."""

SAFETENSORS_DTYPES: Mapping[str, str] = {torch: name for name, torch in TORCH_DTYPES.items()}
"""From names of torch to names of safetensors."""
