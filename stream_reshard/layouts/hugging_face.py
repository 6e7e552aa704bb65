"""The Hugging Face layout: safetensors shards, an index, config.json.

Names in the index are checked before they become paths; names of tensors never do. Links in the folder are followed,
as the cache of huggingface_hub consists of them.
"""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from stream_reshard.architectures import build_model
from stream_reshard.box import Box
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.header import MAX_HEADER_NBYTES, StoredTensor, TensorFile, read_header
from stream_reshard.layouts.base import TORCH_DTYPES, Layout, Slice
from stream_reshard.layouts.hf_config import CONFIG_NAME, SourceConfig, read_config
from stream_reshard.model import Model, Parameter
from stream_reshard.small_files import MAX_JSON_NBYTES, read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq")
"""Buffers that old versions of transformers saved; they follow from config.json."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")

MAX_PROBLEMS = 1000
"""More of one kind are not listed: a hostile index must not fill the memory with what is wrong with it."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_source(root: Path) -> tuple[SourceConfig, Layout]:
    """Read the config and all headers of a Hugging Face folder. Raises Refused with everything that is wrong."""
    problems = Problems()
    config = problems.collect(open_config, root)
    files = problems.collect(open_files, root)
    problems.raise_if_any()
    return config, layout_of(root, model_of(config, files), files)


def model_of(config: SourceConfig, files: tuple[TensorFile, ...]) -> Model:
    """The model that the config describes. Raises SourceError where the shards are far from enough for its layers."""
    num_tensors = sum(len(file.tensors) for file in files)
    if config.model.num_hidden_layers > num_tensors:
        raise SourceError(f"config.json: num_hidden_layers is {config.model.num_hidden_layers}, but the shards hold "
                          f"{num_tensors} tensors in all")
    return build_model(config.family, config.model)


def open_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> SourceConfig:
    """The config of a Hugging Face folder, of at most `max_nbytes`. Raises SourceError or Refused."""
    if not os.path.isdir(root):
        raise SourceError(f"{quoted(root)} is not a folder")
    if not (root / CONFIG_NAME).is_file():
        raise SourceError(f"{quoted(root)} holds no {CONFIG_NAME}: it is not a Hugging Face checkpoint")
    return read_config(root, max_nbytes)


def open_files(root: Path, max_nbytes: int = MAX_HEADER_NBYTES) -> tuple[TensorFile, ...]:
    """The headers of all shards, checked against the index. Raises SourceError or Refused.

    Neither the index nor all headers together may have more than `max_nbytes`.
    """
    single, index = (root / SINGLE_NAME).is_file(), (root / INDEX_NAME).is_file()
    if single and index:
        raise SourceError(f"{quoted(root)} holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is stale")
    if single:
        return (read_header(root, SINGLE_NAME, max_nbytes),)
    if not index:
        raise _without_shards(root)
    weight_map = _weight_map(root, max_nbytes)
    problems, files, left = Problems(), [], max_nbytes
    for name in sorted(set(weight_map.values())):
        if (file := problems.collect(read_header, root, name, left)) is not None:
            files.append(file)
            left = max(0, left - file.tensors[0].begin)
    problems.raise_if_any()
    _check_index(weight_map, files, problems)
    problems.raise_if_any()
    return tuple(files)


def _without_shards(root: Path) -> SourceError:
    """Why a folder without single file and index is refused, with what to do."""
    pickled = sorted(path.name for pattern in _PICKLED for path in root.glob(pattern))
    if pickled:
        return SourceError(
            f"{quoted(root)} holds pickled weights ({quoted(pickled[0])}), which are never opened because they can run "
            f"code; convert them where you trust them: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(NEW)")
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    if shards:
        return SourceError(f"{quoted(root)} holds {len(shards)} shards such as {quoted(shards[0])}, but no "
                           f"{INDEX_NAME}")
    return SourceError(f"{quoted(root)} holds neither {SINGLE_NAME} nor {INDEX_NAME}: it is not a Hugging Face "
                       f"checkpoint")


def _weight_map(root: Path, max_nbytes: int) -> Mapping[str, str]:
    weight_map = read_json(root, INDEX_NAME, max_nbytes).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{INDEX_NAME} has no weight_map")
    problems = Problems()
    for name in dict.fromkeys(map(str, weight_map.values())):
        if not _SHARD_NAME.fullmatch(name):
            problems.append(SourceError(f"{INDEX_NAME} names {quoted(name)}, which is not a safetensors file in "
                                        f"the folder"))
        elif len(name) > 255 or not (root / name).is_file():
            problems.append(SourceError(f"{INDEX_NAME} names {quoted(name)}, which is missing"))
    problems.raise_if_any()
    return weight_map


def _check_index(weight_map: Mapping[str, str], files: list[TensorFile], problems: Problems) -> None:
    found: dict[str, str] = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        if tensor.key in found:
            problems.append(SourceError(f"{quoted(tensor.key)} is in both {found[tensor.key]} and {tensor.file}"))
        found[tensor.key] = tensor.file
    differ = (key for key in sorted(found.keys() | weight_map.keys()) if weight_map.get(key) != found.get(key))
    for key in islice(differ, MAX_PROBLEMS):
        told, actual = weight_map.get(key), found.get(key)
        problems.append(SourceError(f"{quoted(key)} is in {actual or 'no shard'}, but {INDEX_NAME} says "
                                    f"{quoted(told) if told else 'nothing of it'}"))


def layout_of(root: Path, model: Model, files: tuple[TensorFile, ...]) -> Layout:
    """Match the model's parameters with the tensors found, each by name and shape. Raises Refused."""
    tensors = {tensor.key: tensor for file in files for tensor in file.tensors}
    problems = Problems()
    slices: dict[str, tuple[Slice, ...]] = {}
    ignored: dict[str, str] = {}
    for parameter in model.parameters:
        tensor = tensors.pop(parameter.hugging_face, None)
        if parameter.tied_to is not None:
            if tensor is not None:
                ignored[tensor.key] = f"tied to {model.by_name[parameter.tied_to].hugging_face}"
        elif found := problems.collect(_slice, parameter, tensor):
            slices[parameter.name] = (found,)
    for key in tensors:
        if _IGNORED.fullmatch(key):
            ignored[key] = "follows from config.json"
        else:
            problems.append(SourceError(f"unexpected tensor {quoted(key)} in {tensors[key].file}: a "
                                        f"{model.config.family} model of this config does not have it"))
    problems.raise_if_any()
    return Layout("Hugging Face", root, model, files, slices, {}, ignored)


def _slice(parameter: Parameter, tensor: StoredTensor | None) -> Slice:
    """The whole parameter as it stands in its tensor. Raises SourceError where it does not stand there so."""
    key = parameter.hugging_face
    if tensor is None:
        hint = "; is the model tied? then config.json must say so" if parameter.name == "lm_head" else ""
        raise SourceError(f"{key} is missing{hint}")
    if tensor.shape != parameter.matrix_shape:
        raise SourceError(f"{key} has the shape {tensor.shape}, but config.json asks for {parameter.matrix_shape}")
    if tensor.dtype not in TORCH_DTYPES:
        raise SourceError(f"{key} has the dtype {tensor.dtype}: it is quantised; dequantise the model first")
    return Slice(parameter.name, parameter.whole, tensor, Box.whole(tensor.shape), parameter.matrix)
