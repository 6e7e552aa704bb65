"""Architectures: one small table per model family; a new family is its difference from an old one.

- base:  Family, and how it becomes a Model
- llama: Llama and what shares its modules (SmolLM2, TinyLlama, Vicuna ...)
- qwen2: Llama with biases on the query, key and value projections
- mistral: Llama's tensors, full attention
- qwen2_moe: Qwen2 with experts in place of the MLP
- smollm3: Llama's tensors, some layers without rotary embedding

A family is chosen as transformers' auto classes choose it: by `model_type`, and by the class name only without one.
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
"""By the class name in config.json's `architectures`."""

BY_MODEL_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES.values()}
"""By config.json's `model_type`."""

UNSUPPORTED = {
    "qwen3": "its q_norm and k_norm weights have no place in Nanotron",
    "olmo2": "its q_norm and k_norm weights and its norm order have no place in Nanotron",
    "gemma": "its norms and embedding scale have no place in Nanotron",
    "gemma2": "its norms, logit caps and embedding scale have no place in Nanotron",
    "gemma3_text": "its norms, q_norm, k_norm and embedding scale have no place in Nanotron",
    "mixtral": "a mixture of experts in this form has no place in Nanotron",
    "qwen3_moe": "its q_norm and k_norm weights have no place in Nanotron",
    "deepseek_v3": "its latent attention has no place in Nanotron",
    "starcoder2": "Nanotron's main branch no longer runs Starcoder2",
    "mamba": "Nanotron's main branch no longer runs Mamba",
    "phi3": "its projections are fused and its rope is scaled in ways Nanotron does not know",
}
"""Reason to refuse a well-known `model_type`, for a message that helps."""

_CLASS = re.compile(r"(?:fsdp)?(.+?)(?:for[a-z0-9]+|lmheadmodel|pretrainedmodel|model)?", re.ASCII | re.IGNORECASE)


def model_type_of(class_name: str) -> str | None:
    """The `model_type` of a class by its name, whatever its spelling (LLaMAForCausalLM), its head, and the prefix that
    transformers itself drops (FSDPLlamaForCausalLM). None where neither table has it."""
    match = _CLASS.fullmatch(class_name)
    plain = {name.replace("_", ""): name for name in (*UNSUPPORTED, *BY_MODEL_TYPE)}
    return plain.get(match[1].lower().replace("_", "")) if match else None


def has_language_model_head(class_name: str) -> bool:
    """True where a class, by its name, predicts the next token."""
    return class_name.lower().endswith(("causallm", "lmheadmodel", "conditionalgeneration"))


__all__ = ["BY_MODEL_TYPE", "FAMILIES", "UNSUPPORTED", "Family", "build_model", "has_language_model_head",
           "model_type_of"]
