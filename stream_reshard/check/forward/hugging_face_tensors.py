"""The tensors of a Hugging Face checkpoint by name, with the shapes that transformers' modules give them."""
from __future__ import annotations

import re
from pathlib import Path

from stream_reshard.check.forward.hugging_face_config import HuggingFaceConfig
from stream_reshard.check.forward.settings import DTYPES
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.storage.header import SHARD_NAME, StoredTensor, TensorFile, read_header
from stream_reshard.storage.small_files import read_json
from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_weights import BIN_NAME

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_KINDS = (("model.safetensors", "model.safetensors.index.json", SHARD_NAME),
          ("pytorch_model.bin", "pytorch_model.bin.index.json", BIN_NAME))
"""(only shard, index, names of shards), in the order in which transformers looks for them."""

_LAYER = re.compile(r"(?:model\.)*layers\.(\d{1,12})\.", re.ASCII)


class HuggingFaceTensors(dict[str, StoredTensor]):
    """Stored tensors by name."""

    def __init__(self, root: Path, problems: Problems, max_nbytes: int, num_layers: int):
        """Read the index, and the headers of the shards with tensors of the first `num_layers` layers, of at most
        `max_nbytes` each. Raises SourceError."""
        self._root, self._problems = root, problems
        self._turned: set[str] = set()
        """Names of tensors that do not stand row by row."""
        self._stored = {tensor.key: tensor for name in _shards(root, max_nbytes, num_layers)
                        for tensor in self._read(name, max_nbytes).tensors}

    def _read(self, name: str, max_nbytes: int) -> TensorFile:
        if not name.endswith(".bin"):
            return read_header(self._root, name, max_nbytes)
        file = read_torch_file(self._root, name, max_nbytes).weights()
        self._turned |= file.strides.keys()
        return file

    def find(self, config: HuggingFaceConfig) -> None:
        """Look up every parameter. Missing ones, and ones of another shape or dtype, go to `problems`."""
        if config.num_layers > len(self._stored):
            self._problems.append(SourceError(f"num_hidden_layers is {config.num_layers}, but there are "
                                              f"{len(self._stored)} tensors in {quoted(self._root)}"))
            return
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self._take(EMBEDDING, config.vocab_size, hidden)
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}."
            self._take(f"{name}input_layernorm.weight", hidden)
            for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                self._linear(f"{name}self_attn.{part}_proj", rows, hidden, config.has_qkv_bias)
            self._linear(f"{name}self_attn.o_proj", hidden, heads, config.has_o_bias)
            self._take(f"{name}post_attention_layernorm.weight", hidden)
            if config.layers_with_experts[layer]:
                self._find_experts(config, f"{name}mlp.")
            else:
                self._find_mlp(f"{name}mlp.", hidden, config.intermediate_size, config.has_mlp_bias)
        self._take(FINAL_NORM, hidden)
        if not config.is_tied:
            self._take(HEAD, config.vocab_size, hidden)
        del self._stored

    def _find_experts(self, config: HuggingFaceConfig, name: str) -> None:
        self._take(f"{name}gate.weight", config.num_experts, config.hidden_size)
        for expert in range(config.num_experts):
            self._find_mlp(f"{name}experts.{expert}.", config.hidden_size, config.expert_intermediate_size)
        self._find_mlp(f"{name}shared_expert.", config.hidden_size, config.shared_intermediate_size)
        self._take(f"{name}shared_expert_gate.weight", 1, config.hidden_size)

    def _find_mlp(self, name: str, hidden: int, ffn: int, has_bias: bool = False) -> None:
        self._linear(f"{name}gate_proj", ffn, hidden, has_bias)
        self._linear(f"{name}up_proj", ffn, hidden, has_bias)
        self._linear(f"{name}down_proj", hidden, ffn, has_bias)

    def _linear(self, name: str, rows: int, columns: int, has_bias: bool) -> None:
        self._take(f"{name}.weight", rows, columns)
        if has_bias:
            self._take(f"{name}.bias", rows)

    def _take(self, name: str, *shape: int) -> None:
        # transformers' loader strips or adds one `model.` (rename_source_key in core_model_loading.py).
        spellings = (name, f"model.{name}", name.removeprefix("model."))
        tensor = next((self._stored[spelled] for spelled in spellings if spelled in self._stored), None)
        if tensor is None:
            self._problems.append(SourceError(f"{name} is missing in {quoted(self._root)}"))
        elif tensor.shape != shape or tensor.dtype not in DTYPES:
            self._problems.append(SourceError(f"{name} has the shape {tensor.shape} and dtype {tensor.dtype}, "
                                              f"transformers' module has {shape} of {', '.join(DTYPES)}"))
        elif tensor.key in self._turned:
            self._problems.append(SourceError(f"{tensor.key} does not stand row by row in {tensor.file}, and a forward "
                                              f"pass reads rows; save it again after .contiguous()"))
        else:
            self[name] = tensor


def _shards(root: Path, max_nbytes: int, num_layers: int) -> list[str]:
    """Names of the shards with tensors of the first layers. Raises SourceError without any."""
    for single, index, shard_name in _KINDS:
        if (root / index).is_file():
            weight_map = read_json(root, index, max_nbytes, {"weight_map"}).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or not _are_shards(weight_map, shard_name):
                raise SourceError(f"{index} has no weight_map of shards in the folder")
            return sorted({name for key, name in weight_map.items()
                           if not (match := _LAYER.match(key)) or int(match[1]) < num_layers})
        if (root / single).is_file():
            return [single]
    raise SourceError(f"{quoted(root)} holds neither {_KINDS[0][0]} nor {_KINDS[0][1]}, nor {_KINDS[1][0]}")


def _are_shards(weight_map: dict[str, object], shard_name: re.Pattern[str]) -> bool:
    return all(isinstance(name, str) and len(name) < 256 and shard_name.fullmatch(name) for name in weight_map.values())
