"""The tensors of a Nanotron checkpoint by parameter and rank, found by the names of the files, as each rank does.

Written from Nanotron: names from `get_path` (nanotron/serialize/utils.py), stages from `build_model`
(nanotron/models/base.py), shapes from the modules. A rank opens the file of its own name and copies its content
without reading the slices in the header (nanotron/serialize/weights.py); so they are not read here either.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stream_reshard.check.forward.nanotron_config import NanotronConfig
from stream_reshard.check.forward.settings import DTYPES
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.storage.header import StoredTensor, read_header
from stream_reshard.storage.small_files import is_litter

EMBEDDING = "token_position_embeddings.pp_block.token_embedding.weight"
FINAL_NORM = "final_layer_norm.pp_block.weight"
HEAD = "lm_head.pp_block.weight"

_RANKS = re.compile(r"_pp-rank-(\d{1,6})-of-(\d{1,6})_tp-rank-(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)


class NanotronTensors(dict[str, list[StoredTensor]]):
    """Tensors by parameter: one per tensor-parallel rank of a sharded parameter, else a single one."""

    def __init__(self, root: Path, problems: Problems, max_nbytes: int):
        """Find the topology; `max_nbytes`: limit on a header. Raises SourceError if the files do not agree on one."""
        self._root, self._problems, self._max_nbytes = root, problems, max_nbytes
        folder = _folder_of(EMBEDDING)
        names = [path.name for path in sorted((root / folder).glob("*"))
                 if _ranks_in(path.name) and not is_litter(path.name)]
        sizes = {_ranks_in(name)[1::2] for name in names}
        if len(sizes) != 1 or len(names) != next(iter(sizes))[1]:
            raise SourceError(f"{quoted(folder)} holds {len(names)} files of {len(sizes)} topologies; one for each "
                              f"tensor-parallel rank is needed")
        (self.num_stages, self.num_tp), = sizes
        self.version = dict(read_header(root, f"{folder}/{names[0]}", max_nbytes).metadata).get("version", "")
        """Format version, from the header of the embedding."""

    def find(self, config: NanotronConfig, may_be_moved: bool) -> None:
        """Look up every parameter. Missing ones, and ones of another shape or dtype than in Nanotron's module, go to
        `problems`. With `may_be_moved`, blocks may stand on other stages than in Nanotron's balancing."""
        self._check_splits(config)
        layers = (path.name for path in (self._root / "model/model/decoder").glob("*"))
        num_found = sum(not is_litter(f"{name}/") and not is_litter(name) for name in layers)
        if config.num_layers != num_found:
            self._problems.append(SourceError(f"num_hidden_layers is {config.num_layers}, but there are {num_found} "
                                              f"layers in {quoted(self._root)}"))
            return
        head_cost = config.vocab_size * config.hidden_size
        stages = list(balanced(config.num_layers, config.layer_cost, head_cost, self.num_stages))
        if may_be_moved:
            blocks = [EMBEDDING, *(f"decoder.{layer}.pp_block.attn.qkv_proj.weight" for layer in range(
                config.num_layers)), FINAL_NORM, HEAD]
            stages = [min(self._stages_named(block), default=stage) for block, stage in zip(blocks, stages)]
        layer_stages = stages[1:-2]
        if layer_stages != sorted(layer_stages):
            self._problems.append(SourceError(f"the layers of {quoted(self._root)} stand on the stages {layer_stages}, "
                                              f"which are not in order"))
        hidden, rows = config.hidden_size, config.vocab_size // self.num_tp
        self._sharded(EMBEDDING, stages[0], (rows, hidden))
        for layer, stage in enumerate(layer_stages):
            self._find_layer(config, layer, stage)
        self._whole(FINAL_NORM, (hidden,))
        if not config.is_tied:
            self._sharded(HEAD, stages[-1], (rows, hidden))

    def _check_splits(self, config: NanotronConfig) -> None:
        sizes = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
                 "intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size}
        for name, size in sizes.items():
            if size % self.num_tp:
                self._problems.append(SourceError(f"{name} {size} cannot be split over the {self.num_tp} "
                                                  f"tensor-parallel ranks that the files name"))

    def _find_layer(self, config: NanotronConfig, layer: int, stage: int) -> None:
        name, hidden = f"decoder.{layer}.pp_block.", config.hidden_size
        num_qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim // self.num_tp
        self._whole(f"{name}input_layernorm.weight", (hidden,))
        self._sharded(f"{name}attn.qkv_proj.weight", stage, (num_qkv, hidden))
        if config.has_bias:
            self._sharded(f"{name}attn.qkv_proj.bias", stage, (num_qkv,))
        self._sharded(f"{name}attn.o_proj.weight", stage, (hidden, hidden // self.num_tp))
        self._whole(f"{name}post_attention_layernorm.weight", (hidden,))
        experts = config.experts
        if experts is None or layer not in experts.layers:
            self._find_mlp(f"{name}mlp.", stage, hidden, config.intermediate_size)
            return
        number, ffn = experts.num_experts, experts.intermediate_size
        self._whole(f"{name}mlp.router.weight", (number, hidden))
        self._whole(f"{name}mlp.experts.merged_gate_up_proj", (number, hidden, 2 * ffn))
        self._whole(f"{name}mlp.experts.merged_down_proj", (number, ffn, hidden))
        if experts.shared_intermediate_size is not None:
            self._find_mlp(f"{name}mlp.shared_expert.", stage, hidden, experts.shared_intermediate_size)
            self._whole(f"{name}mlp.shared_expert_gate.weight", (1, hidden))

    def _find_mlp(self, name: str, stage: int, hidden: int, ffn: int) -> None:
        self._sharded(f"{name}gate_up_proj.weight", stage, (2 * ffn // self.num_tp, hidden))
        self._sharded(f"{name}down_proj.weight", stage, (hidden, ffn // self.num_tp))

    def _sharded(self, parameter: str, stage: int, shape: tuple[int, ...]) -> None:
        names = (f"{_stem_of(parameter)}_pp-rank-{stage}-of-{self.num_stages}_tp-rank-{tp}-of-{self.num_tp}"
                 f".safetensors" for tp in range(self.num_tp))
        found = [self._problems.collect(self._tensor, parameter, name, shape, f"stage {stage}") for name in names]
        self[parameter] = [tensor for tensor in found if tensor is not None]

    def _whole(self, parameter: str, shape: tuple[int, ...]) -> None:
        name = f"{_stem_of(parameter)}.safetensors"
        found = self._problems.collect(self._tensor, parameter, name, shape, "every rank")
        self[parameter] = [found] if found is not None else []

    def _tensor(self, parameter: str, name: str, shape: tuple[int, ...], reader: str) -> StoredTensor:
        path = f"{_folder_of(parameter)}/{name}"
        if not (self._root / path).is_file():
            stages = sorted(self._stages_named(parameter))
            found = f"; its files name stage {', '.join(map(str, stages))}" if stages else ""
            raise SourceError(f"{quoted(path)} is missing: {reader} of Nanotron looks for it there{found}")
        tensor, *others = read_header(self._root, path, self._max_nbytes).tensors
        if tensor.key != "data" or others:
            raise SourceError(f"{quoted(path)} holds {quoted(tensor.key)}, Nanotron reads the one tensor data")
        if tensor.shape != shape or tensor.dtype not in DTYPES:
            raise SourceError(f"{quoted(path)} has the shape {tensor.shape} and dtype {tensor.dtype}, Nanotron's "
                              f"module has {shape} of {', '.join(DTYPES)}")
        return tensor

    def _stages_named(self, parameter: str) -> set[int]:
        """The stages that the files of a parameter name."""
        paths = (self._root / _folder_of(parameter)).glob("*")
        return {ranks[0] for path in paths if (ranks := _ranks_in(path.name))}


def _ranks_in(name: str) -> tuple[int, ...]:
    """(stage, number of stages, tp rank, number of tp ranks) in the name of a file; () for a name without ranks."""
    match = _RANKS.search(name)
    return tuple(map(int, match.groups())) if match else ()


def _folder_of(parameter: str) -> str:
    return "/".join(["model", "model", *parameter.split(".")[:-1]])


def _stem_of(parameter: str) -> str:
    return f"model_{parameter.rsplit('.', 1)[1]}"


def balanced(num_layers: int, layer_cost: int, head_cost: int, num_stages: int) -> Iterator[int]:
    """The stages of embedding, layers, final norm and head, in this order. `build_model` gives blocks to a stage until
    the cost of all blocks so far exceeds the share of all stages so far."""
    total, done, stage = num_layers * layer_cost + head_cost, 0, 0
    for cost in (0, *[layer_cost] * num_layers, 0, head_cost):
        yield stage
        done += cost
        if done > total * ((stage + 1) / num_stages):
            stage += 1
