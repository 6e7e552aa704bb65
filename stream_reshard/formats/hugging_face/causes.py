"""Reasons why the tensors of a Hugging Face folder are not those of its model: the one cause behind many faults.

This runs when opening failed, and reads the headers of a few shards once more.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from stream_reshard.errors import Cause, StreamReshardError, quoted
from stream_reshard.formats.hugging_face.config import SourceConfig, class_name_of
from stream_reshard.formats.hugging_face.pickled import read_weights
from stream_reshard.model.architectures import has_language_model_head
from stream_reshard.model.parameters import Model
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.header import StoredTensor

_MAX_SHARDS = 8
_MAX_STRANGE = 1000
_MAX_KEY_LENGTH = 500

_MIN_WRAPPED = 4
"""Names that must have a part too much before that is held for a wrapper's; the smallest model has eleven tensors."""

_METHODS = (
    ("g_idx", "GPTQ"), ("bitsandbytes__", "bitsandbytes, 4 bit"), ("quant_map", "bitsandbytes, 4 bit"),
    ("absmax", "bitsandbytes, 4 bit"), ("SCB", "bitsandbytes, 8 bit"), ("weight_packed", "compressed-tensors"),
    ("weight_scale_inv", "FP8"), ("weight_scale_2", "ModelOpt"), ("W_q", "HQQ"), ("codebooks", "AQLM"),
    ("Qidxs", "QuIP#"), ("trellis", "EXL3"), ("q_weight", "EXL2"), ("_data", "quanto"), ("weight_scales", "EETQ"),
    ("qweight", "AWQ or GPTQ"), ("qzeros", "AWQ or GPTQ"), ("weight_scale", "FP8 or compressed-tensors"),
    ("weight_zero_point", "compressed-tensors"), ("input_scale", "FP8"), ("_blocks", "MXFP4"), ("qdata", "torchao"),
    ("scales", "MLX"))
"""The last parts of names that only quantised weights have, and the methods that give them; the surest first."""

_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that tell of quantised weights: of transformers, of old compressed-tensors, of MLX."""

_CURES = {"_orig_mod": "torch.compile wraps a model so: save model._orig_mod",
          "base_model": "PEFT wraps a model so: save model.merge_and_unload()",
          "module": "DistributedDataParallel wraps a model so: save model.module",
          "_fsdp_wrapped_module": "FSDP wraps a model so: save its full state_dict",
          "language_model": "it is the text part of a larger model: save that part alone"}


def quantization_of(raw: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantised, or were, as a config.json says; None where it says nothing."""
    for key in _CONFIG_KEYS:
        if said := raw.get(key):
            told = said if isinstance(said, dict) else {}
            bits = f"{told['bits']} bits" if "bits" in told else key
            return str(told.get("quant_method") or told.get("format") or bits)
    return None


@dataclass
class _Seen:
    """Tensors that some shards hold, beside those that they should."""

    strange: dict[str, str] = field(default_factory=dict)
    """Dtypes of tensors that the model does not have, by name; so many at most."""
    packed: StoredTensor | None = None
    """A tensor of the model in a dtype that is not one of weights."""
    present: set[int] = field(default_factory=set)
    """Numbers of parameters."""

    def add(self, tensor: StoredTensor, number: int | None) -> None:
        """One more tensor, and the number of the parameter that it holds."""
        if number is not None:
            self.present.add(number)
            if tensor.dtype not in TORCH_DTYPES:
                self.packed = self.packed or tensor
        elif len(self.strange) < _MAX_STRANGE and len(tensor.key) <= _MAX_KEY_LENGTH:
            self.strange[tensor.key] = tensor.dtype


def cause_of(root: Path, config: SourceConfig, model: Model | None, shards: Sequence[str],
             max_nbytes: int) -> Cause | None:
    """The cause that explains why the shards do not hold the model; None where none is known."""
    seen = _Seen()
    for tensor in _tensors(root, shards, max_nbytes):
        seen.add(tensor, model.number_of_tensor(tensor.key) if model else None)
    said = quantization_of(config.raw)
    text = (_lora(seen.strange) or _quantised(said, seen) or (_wrapped(model, seen) if model else None) or
            _metas(seen.strange) or _said_quantised(said, seen) or (_headless(config, model, seen) if model else None))
    return Cause(text) if text else None


def _tensors(root: Path, shards: Sequence[str], max_nbytes: int) -> Iterator[StoredTensor]:
    for name in islice(shards, _MAX_SHARDS):
        try:
            yield from read_weights(root, name, max_nbytes).tensors
        except StreamReshardError:
            continue


def _lora(strange: Mapping[str, str]) -> str | None:
    key = next((key for key in strange if ".lora_A." in key or ".lora_embedding_A" in key), None)
    return key and (f"the shards hold LoRA matrices beside the weights, such as {quoted(key)}; merge them first: load "
                    f"the model with peft, merge_and_unload(), save_pretrained(NEW)")


def _quantised(said: str | None, seen: _Seen) -> str | None:
    """By names and dtypes of tensors."""
    ends = {key.replace(":", ".").split(".")[-1]: key for key in seen.strange}
    for sign, method in _METHODS:
        for end, key in ends.items():
            if end == sign or ("_" in (sign[0], sign[-1]) and sign in end):
                return _dequantise(said or method, key, seen.strange[key])
    return _dequantise(said or seen.packed.dtype, seen.packed.key, seen.packed.dtype) if seen.packed else None


def _said_quantised(said: str | None, seen: _Seen) -> str | None:
    """By the config alone, where other tensors stand in place of the weights."""
    return next((_dequantise(said, key, dtype) for key, dtype in seen.strange.items()), None) if said else None


def _dequantise(method: str, key: str, dtype: str) -> str:
    return (f"the weights are quantised ({quoted(method)}), such as {quoted(key)} of dtype {dtype}; take the model "
            f"before it was quantised, or dequantise it first, with the library that quantised it")


def _wrapped(model: Model, seen: _Seen) -> str | None:
    """A common part of names without which they would be those of weights that are not there."""
    counts: Counter[tuple[str, bool]] = Counter()
    examples: dict[tuple[str, bool], str] = {}
    for key in seen.strange:
        for part, is_first in _parts_too_many(model, key, seen.present):
            counts[part, is_first] += 1
            examples.setdefault((part, is_first), key)
    if not counts:
        return None
    (part, is_first), number = counts.most_common(1)[0]
    if number < _MIN_WRAPPED or 2 * number < min(len(seen.strange), model.num_stored - len(seen.present)):
        return None
    example = examples[part, is_first]
    where = "begin with" if is_first else "hold"
    cure = next((cure for word, cure in _CURES.items() if word in part.split(".")), "save the model that is wrapped so")
    return (f"the names of {number if number < _MAX_STRANGE else 'most'} tensors {where} {quoted(part + '.')}, such as "
            f"{quoted(example)}: transformers would find none of them and start from random weights; {cure}, or rename "
            f"the tensors")


def _parts_too_many(model: Model, key: str, present: set[int]) -> Iterator[tuple[str, bool]]:
    """Parts of a name, and whether it begins with them, without which it is that of an absent parameter."""
    words = key.split(".")
    for is_exact in (True, False):  # A name with `model.` too much, or without it, is one of a parameter too.
        for length in range(1, min(len(words), 6)):
            found = [(".".join(words[first:first + length]), not first) for first in range(len(words) - length)
                     if _is_absent(model, ".".join(words[:first] + words[first + length:]), present, is_exact)]
            if found:
                yield from found
                return


def _is_absent(model: Model, key: str, present: set[int], is_exact: bool) -> bool:
    number = model.number_of_tensor(key)
    return number is not None and number not in present and not (is_exact and model.spelling_of(number, key))


def _metas(strange: Mapping[str, str]) -> str | None:
    key = next((key for key in strange if key.endswith(("tok_embeddings.weight", "attention.wq.weight"))), None)
    return key and (f"the tensors have the names of Meta's and Mistral's original format, such as {quoted(key)}; take "
                    f"the shards in the format of Hugging Face (model*.safetensors)")


def _headless(config: SourceConfig, model: Model, seen: _Seen) -> str | None:
    name = class_name_of(config.raw)
    if name is None or has_language_model_head(name) or config.model.tie_word_embeddings:
        return None
    absent = [row for row in model.stored_rows if model.firsts[row] not in seen.present]
    if [model.rows[row].parameter for row in absent] != ["lm_head"]:
        return None
    return (f"config.json names {quoted(name)}, a class without a language-model head, and lm_head.weight is not "
            f"there; it would have to be invented: take the model as {config.family.hugging_face_class} saved it")
