"""Architectures: one small table per model family; a new family states its difference from an existing one.

- base:      Family, and the Model made from it
- llama:     Llama, and all models of its class (SmolLM2, TinyLlama, Vicuna ...)
- qwen2:     Llama with biases on the query, key and value projections
- mistral:   Llama's tensors, full attention
- qwen2_moe: Qwen2 with experts in place of the MLP
- smollm3:   Llama's tensors, some layers without rotary embedding

A family is chosen as transformers' auto classes choose it: by `model_type`, or by the class name where a config gives
no `model_type`.
"""
import re

from stream_reshard.model.architectures.base import Family, build_model
from stream_reshard.model.architectures.llama import LLAMA
from stream_reshard.model.architectures.mistral import MISTRAL
from stream_reshard.model.architectures.qwen2 import QWEN2
from stream_reshard.model.architectures.qwen2_moe import QWEN2_MOE
from stream_reshard.model.architectures.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.hugging_face_class: family for family in (LLAMA, QWEN2, MISTRAL, SMOLLM3, QWEN2_MOE)}
"""The families by the class name in config.json's `architectures`."""

BY_MODEL_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES.values()}
"""The families by config.json's `model_type`."""

UNSUPPORTED = {
    "qwen3": "Nanotron has no q_norm and k_norm weights",
    "olmo2": "Nanotron has no q_norm and k_norm weights, and another order of norms",
    "gemma": "Nanotron has neither its norms nor its embedding scale",
    "gemma2": "Nanotron has neither its norms nor its logit caps nor its embedding scale",
    "gemma3_text": "Nanotron has neither its norms nor q_norm and k_norm nor its embedding scale",
    "mixtral": "Nanotron has no mixture of experts of this form",
    "qwen3_moe": "Nanotron has no q_norm and k_norm weights",
    "deepseek_v3": "Nanotron has no latent attention",
    "starcoder2": "Nanotron's main branch no longer runs Starcoder2",
    "mamba": "Nanotron's main branch no longer runs Mamba",
    "phi3": "Nanotron has neither its fused projections nor its scaling of RoPE",
}
"""Reason to refuse a well-known `model_type`, by `model_type`."""

_CLASS = re.compile(r"(?:fsdp)?(.+?)(?:for[a-z0-9]+|lmheadmodel|pretrainedmodel|model)?", re.ASCII | re.IGNORECASE)


def model_type_of(class_name: str) -> str | None:
    """The `model_type` of a class; None where neither table has it. The name may differ in upper and lower case
    (LLaMAForCausalLM), have any head, and the prefix that transformers itself drops (FSDPLlamaForCausalLM)."""
    match = _CLASS.fullmatch(class_name)
    plain = {name.replace("_", ""): name for name in (*UNSUPPORTED, *BY_MODEL_TYPE)}
    return plain.get(match[1].lower().replace("_", "")) if match else None


def has_language_model_head(class_name: str) -> bool:
    """True where the name of a class is that of a model that predicts the next token."""
    return class_name.lower().endswith(("causallm", "lmheadmodel", "conditionalgeneration"))


__all__ = ["BY_MODEL_TYPE", "FAMILIES", "UNSUPPORTED", "Family", "build_model", "has_language_model_head",
           "model_type_of"]
