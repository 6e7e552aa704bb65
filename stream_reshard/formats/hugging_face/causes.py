"""Reasons why the tensors of a Hugging Face folder are not those of its model: the one cause behind many faults.

These functions run after opening failed, and read the headers of a few shards once more.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from stream_reshard.errors import Cause, StreamReshardError, quoted
from stream_reshard.formats.config_json import SourceConfig, class_name_of, quantization_of
from stream_reshard.formats.hugging_face.index import Shards
from stream_reshard.formats.hugging_face.pickled import read_weights
from stream_reshard.model.architectures import has_language_model_head
from stream_reshard.model.parameters import Model
from stream_reshard.model.truncation import is_in_layers
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.header import StoredTensor

_MAX_SHARDS = 8
"""Shards whose headers are read."""

_MAX_UNEXPECTED, _MAX_KEY_LENGTH = 1000, 500
"""Unexpected tensors that are kept, and characters in the name of one."""

_MIN_WRAPPED = 4
"""Count of names from which on a common part of them is a wrapper's; the smallest model has eleven tensors."""

_METHODS = (
    ("g_idx", "GPTQ"), ("bitsandbytes__", "bitsandbytes, 4 bit"), ("quant_map", "bitsandbytes, 4 bit"),
    ("absmax", "bitsandbytes, 4 bit"), ("SCB", "bitsandbytes, 8 bit"), ("weight_packed", "compressed-tensors"),
    ("weight_scale_inv", "FP8"), ("weight_scale_2", "ModelOpt"), ("W_q", "HQQ"), ("codebooks", "AQLM"),
    ("Qidxs", "QuIP#"), ("trellis", "EXL3"), ("q_weight", "EXL2"), ("_data", "quanto"), ("weight_scales", "EETQ"),
    ("qweight", "AWQ or GPTQ"), ("qzeros", "AWQ or GPTQ"), ("weight_scale", "FP8 or compressed-tensors"),
    ("weight_zero_point", "compressed-tensors"), ("input_scale", "FP8"), ("_blocks", "MXFP4"), ("qdata", "torchao"),
    ("scales", "MLX"))
"""(last part of a name, quantisation method) for names that only quantised weights have; the surest first."""

_CURES = {"_orig_mod": "torch.compile adds it: save model._orig_mod",
          "base_model": "PEFT adds it: save model.merge_and_unload()",
          "module": "DistributedDataParallel adds it: save model.module",
          "_fsdp_wrapped_module": "FSDP adds it: save the model's full state_dict",
          "language_model": "it is the text part of a larger model: save that part alone"}
"""Cures by a part of the names."""


@dataclass
class _Seen:
    """The tensors of a few shards."""

    unexpected: dict[str, str] = field(default_factory=dict)
    """Dtypes of tensors that the model does not have, by name; of at most _MAX_UNEXPECTED."""
    packed: StoredTensor | None = None
    """A tensor of the model whose dtype is none of weights."""
    present: set[int] = field(default_factory=set)
    """Numbers of the parameters that have a tensor."""

    def add(self, tensor: StoredTensor, number: int | None) -> None:
        """Add a tensor. `number`: of its parameter; None where the model does not have the tensor."""
        if number is not None:
            self.present.add(number)
            if tensor.dtype not in TORCH_DTYPES:
                self.packed = self.packed or tensor
        elif len(self.unexpected) < _MAX_UNEXPECTED and len(tensor.key) <= _MAX_KEY_LENGTH:
            self.unexpected[tensor.key] = tensor.dtype


def cause_of(root: Path, config: SourceConfig, model: Model | None, shards: Shards, max_nbytes: int) -> Cause | None:
    """The one cause that explains why the shards do not hold the model; None where none is known."""
    seen = _Seen()
    for tensor in _tensors(root, shards, max_nbytes):
        seen.add(tensor, model.number_of_tensor(tensor.key) if model else None)
    method = quantization_of(config.raw)
    text = (_lora(seen.unexpected) or _quantised(method, seen) or (model and _wrapped(model, seen)) or
            _original(seen.unexpected) or _replaced(method, seen) or (model and _headless(config, model, seen)))
    return Cause(text) if text else None


def _tensors(root: Path, shards: Shards, max_nbytes: int) -> Iterator[StoredTensor]:
    for name in islice(shards.names, _MAX_SHARDS):
        try:
            tensors = read_weights(root, name, max_nbytes).tensors
            yield from (tensor for tensor in tensors if not is_in_layers(tensor.key, shards.left_out))
        except StreamReshardError:
            continue


def _lora(unexpected: Mapping[str, str]) -> str | None:
    key = next((key for key in unexpected if ".lora_A." in key or ".lora_embedding_A" in key), None)
    return key and (f"the shards hold LoRA matrices beside the weights, such as {quoted(key)}; merge them first: load "
                    f"the model with peft, merge_and_unload(), save_pretrained(NEW)")


def _quantised(config_method: str | None, seen: _Seen) -> str | None:
    """Quantised weights, by the names and dtypes of tensors."""
    ends = {key.replace(":", ".").split(".")[-1]: key for key in seen.unexpected}
    for sign, method in _METHODS:
        for end, key in ends.items():
            if end == sign or ("_" in (sign[0], sign[-1]) and sign in end):
                return _dequantise(config_method or method, key, seen.unexpected[key])
    return _dequantise(config_method or seen.packed.dtype, seen.packed.key, seen.packed.dtype) if seen.packed else None


def _replaced(config_method: str | None, seen: _Seen) -> str | None:
    """Quantised weights, by the config and any tensor that the model does not have."""
    if config_method is None or not seen.unexpected:
        return None
    return _dequantise(config_method, *next(iter(seen.unexpected.items())))


def _dequantise(method: str, key: str, dtype: str) -> str:
    return (f"the weights are quantised ({quoted(method)}), such as {quoted(key)} of dtype {dtype}; take the model "
            f"before it was quantised, or dequantise it first, with the library that quantised it")


def _wrapped(model: Model, seen: _Seen) -> str | None:
    """A wrapper's part in many names: without it, they are the names of absent parameters."""
    counts: Counter[tuple[str, bool]] = Counter()
    examples: dict[tuple[str, bool], str] = {}
    for key in seen.unexpected:
        for part, is_first in _extra_parts(model, key, seen.present):
            counts[part, is_first] += 1
            examples.setdefault((part, is_first), key)
    if not counts:
        return None
    (part, is_first), count = counts.most_common(1)[0]
    if count < _MIN_WRAPPED or 2 * count < min(len(seen.unexpected), model.num_stored - len(seen.present)):
        return None
    example = examples[part, is_first]
    verb = "begin with" if is_first else "hold"
    cure = next((cure for word, cure in _CURES.items() if word in part.split(".")), "save the model inside the wrapper")
    return (f"the names of {count if count < _MAX_UNEXPECTED else 'most'} tensors {verb} {quoted(part + '.')}, such as "
            f"{quoted(example)}: transformers would find none of them and start from random weights; {cure}, or rename "
            f"the tensors")


def _extra_parts(model: Model, key: str, present: set[int]) -> Iterator[tuple[str, bool]]:
    """(part, True if the name begins with it) of the shortest parts without which a name is that of an absent
    parameter."""
    words = key.split(".")
    for is_exact in (True, False):  # The parameter's own name first, then its other spellings.
        for length in range(1, min(len(words), 6)):
            parts = [(".".join(words[first:first + length]), not first) for first in range(len(words) - length)
                     if _is_absent(model, ".".join(words[:first] + words[first + length:]), present, is_exact)]
            if parts:
                yield from parts
                return


def _is_absent(model: Model, key: str, present: set[int], is_exact: bool) -> bool:
    number = model.number_of_tensor(key)
    return number is not None and number not in present and not (is_exact and model.spelling_of(number, key))


def _original(unexpected: Mapping[str, str]) -> str | None:
    key = next((key for key in unexpected if key.endswith(("tok_embeddings.weight", "attention.wq.weight"))), None)
    return key and (f"the tensors have the names of Meta's and Mistral's original format, such as {quoted(key)}; take "
                    f"the shards in the format of Hugging Face (model*.safetensors)")


def _headless(config: SourceConfig, model: Model, seen: _Seen) -> str | None:
    name = class_name_of(config.raw)
    if name is None or has_language_model_head(name) or config.model.tie_word_embeddings:
        return None
    absent = [row for row in model.stored_rows if model.firsts[row] not in seen.present]
    if [model.rows[row].parameter for row in absent] != ["lm_head"]:
        return None
    return (f"config.json names {quoted(name)}, a class without a language-model head, and lm_head.weight is missing; "
            f"save the model as a {config.family.hugging_face_class}")
