"""The Nanotron layout to be written: one file per parameter and rank, key "data".

Sources: file names from `get_path` (nanotron/serialize/utils.py), what is split how from the tensor-parallel layers
(nanotron/parallel/tensor_parallel/nn.py) and `create_sharded_parameter` (nanotron/parallel/sharded_parameters.py),
header fields from `TensorMetadata` (nanotron/serialize/metadata.py).
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from stream_reshard.box import Box
from stream_reshard.errors import Problems, UsageError
from stream_reshard.header import StoredTensor, TensorFile, planned_file
from stream_reshard.layouts.base import Fill, Layout, Slice
from stream_reshard.model import Model, ModelConfig, Parameter
from stream_reshard.topology import Topology, assign_stages, padded_size, part_of

VERSIONS = ("1.5", "1.4", "1.2")
"""Checkpoint format versions this module writes: main, trees from April 2024 on, release 0.4 and before."""

MAX_TP, MAX_PP = 1024, 4096
"""Up to where usable numbers of ranks are looked for."""

_KEY = "data"
"""Key of the one tensor in a file (nanotron/serialize/weights.py)."""


@dataclass(frozen=True)
class NanotronFormat:
    """Everything about a Nanotron checkpoint that the model does not decide."""

    topology: Topology
    config_class: str = "LlamaConfig"
    """Nanotron's config class that the trainer will use."""
    version: str = "1.5"
    rope_interleaved: bool = False
    """Whether a head is kept as (pair, half) instead of Hugging Face's (half, pair)."""
    vocab_multiple: int = 1
    """Nanotron's make_vocab_size_divisible_by."""

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding in Nanotron: the trainer pads before it builds the model (nanotron/trainer.py)."""
        return padded_size(vocab_size, self.topology.tp * self.vocab_multiple)


def stages_of(config: ModelConfig, format: NanotronFormat) -> dict[str, int]:
    """The stage of each pipeline block, by its Nanotron name (`decoder.3`).

    Costs as in `get_block_compute_costs` (nanotron/models/llama.py, qwen.py), on the padded vocabulary; blocks without
    a cost of their own ride along.
    """
    layer = (4 * config.num_attention_heads * config.head_dim * config.hidden_size
             + 3 * config.intermediate_size * config.hidden_size)
    head = format.padded_vocab(config.vocab_size) * config.hidden_size
    costs = {"token_position_embeddings": 0}
    costs |= {f"decoder.{i}": layer for i in range(config.num_hidden_layers)}
    costs |= {"final_layer_norm": 0, "lm_head": head, "cast_to_fp32": 0, "loss": 0}
    stages = assign_stages(tuple(costs.values()), format.topology.pp)
    return {name: stage for name, stage in zip(costs, stages) if name not in ("cast_to_fp32", "loss")}


def topology_problems(model: Model, format: NanotronFormat) -> Problems:
    """Every way in which the model cannot be cut like this, one UsageError each."""
    problems = Problems()
    tp, pp, config = format.topology.tp, format.topology.pp, model.config
    uneven: dict[tuple[str, int], str] = {}
    for parameter in model.stored():
        if parameter.split and parameter.split != "vocab":
            size = parameter.shape[parameter.dims.index(parameter.split)]
            if size % tp:
                uneven.setdefault((parameter.split, size), parameter.name)
    for (dim, size), name in uneven.items():
        usable = [n for n in range(1, min(size, MAX_TP) + 1) if all(s % n == 0 for _, s in uneven)]
        problems.append(UsageError(f"--tp {tp} cannot split the {size} {dim} of {name}; "
                                   f"--tp can be {_listed(usable)}"))
    empty = _empty_stages(config, format) if pp <= MAX_PP else [pp - 1]
    if empty:
        usable = [n for n in range(1, min(pp, config.num_hidden_layers + 4)) if not _empty_stages(
            config, NanotronFormat(Topology(tp, n), vocab_multiple=format.vocab_multiple))]
        problems.append(UsageError(f"--pp {pp} leaves stage {_listed(empty)} without parameters in Nanotron's own "
                                   f"balancing of {config.num_hidden_layers} layers; --pp can be {_listed(usable)}"))
    return problems


def _empty_stages(config: ModelConfig, format: NanotronFormat) -> list[int]:
    return sorted(set(range(format.topology.pp)) - set(stages_of(config, format).values()))


def _listed(numbers: Iterable[int]) -> str:
    texts = list(map(str, numbers))
    return ", ".join(texts if len(texts) <= 20 else [*texts[:19], f"... {texts[-1]}"])


@dataclass(frozen=True)
class _Part:
    """What one tensor-parallel rank holds of one parameter, in three coordinate systems."""

    region: Box
    """Of the parameter; may be empty where the rank holds padding only."""
    place: Box
    """Of the rank's tensor, padding included."""
    origin: Box
    """Of the unsharded tensor, padding included."""


def target_layout(root: Path, model: Model, dtypes: Mapping[str, str], format: NanotronFormat) -> Layout:
    """What Nanotron saves for this model: the same files, header fields and places.

    `dtypes`: the safetensors dtype of each parameter; fused parameters must agree. The model must fit the topology
    (`topology_problems`).
    """
    stages = stages_of(model.config, format)
    files: list[TensorFile] = []
    slices: dict[str, tuple[Slice, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    for name, group in groupby(model.stored(), key=lambda parameter: parameter.nanotron):
        fused = tuple(group)
        made = _rank_files(name, fused, dtypes[fused[0].name], stages[name.split(".pp_block")[0]], format)
        files += (file for file, _ in made)
        for i, parameter in enumerate(fused):
            held = [(file.tensors[0], parts[i]) for file, parts in made]
            slices[parameter.name] = tuple(
                Slice(parameter.name, part.region, tensor, _without_padding(parameter, part), _order(parameter, format))
                for tensor, part in held if part.region.num_elements)
            if padding := tuple(fill for tensor, part in held for fill in _fill(parameter, tensor, part)):
                fills[parameter.name] = padding
    return Layout("Nanotron", root, model, tuple(files), slices, fills, {})


def _rank_files(name: str, fused: tuple[Parameter, ...], dtype: str, stage: int,
                format: NanotronFormat) -> list[tuple[TensorFile, tuple[_Part, ...]]]:
    """The files of one Nanotron parameter, one per tensor-parallel rank that writes it, and what each holds."""
    folder, _, suffix = f"model.model.{name}".rpartition(".")
    stem = f"{folder.replace('.', '/')}/model_{suffix}"
    topology = format.topology
    if fused[0].split is None:
        shape = fused[0].matrix_shape
        part = _Part(fused[0].whole, Box.whole(shape), Box.whole(shape))
        return [(planned_file(f"{stem}.safetensors", [(_KEY, dtype, shape)], {}), (part,))]
    made = []
    for tp in range(topology.tp):
        parts = tuple(_parts(fused, tp, format))
        path = f"{stem}_pp-rank-{stage}-of-{topology.pp}_tp-rank-{tp}-of-{topology.tp}.safetensors"
        metadata = {"version": format.version, "unsharded_shape": str(_unsharded_shape(fused, format)),
                    "local_global_slices_pairs": _slices_pairs(parts, fused)}
        made.append((planned_file(path, [(_KEY, dtype, parts[-1].place.stop)], metadata), parts))
    return made


def _padded_shape(parameter: Parameter, format: NanotronFormat) -> tuple[int, ...]:
    """The shape with padding: Nanotron pads the vocabulary, nothing else."""
    return tuple(format.padded_vocab(n) if dim == "vocab" else n for dim, n in zip(parameter.dims, parameter.shape))


def _parts(fused: tuple[Parameter, ...], tp: int, format: NanotronFormat) -> Iterator[_Part]:
    """What rank `tp` holds of each parameter: the shard is the ranks' parts one below the other, not a part of the
    fused whole (`contiguous_chunks`, nanotron/parallel/sharded_parameters.py)."""
    local_row = global_row = 0
    for parameter in fused:
        padded = _padded_shape(parameter, format)
        split = parameter.dims.index(parameter.split or "")
        start, stop = part_of(padded[split], format.topology.tp, tp)
        size = parameter.shape[split]
        region = parameter.whole.with_extent(split, min(start, size), min(stop, size))
        held = _matrix_box(parameter, Box.whole(padded).with_extent(split, start, stop), padded)
        local = held.seen_from(held)
        yield _Part(region, _moved_down(local, local_row), _moved_down(held, global_row))
        local_row += local.stop[0]
        global_row += _matrix_box(parameter, Box.whole(padded), padded).stop[0]


def _matrix_box(parameter: Parameter, region: Box, shape: tuple[int, ...]) -> Box:
    """A region of a parameter of this shape as a box of the matrix it is stored as; only outermost dims may be cut."""
    inner = [math.prod(shape[dim] for dim in group[1:]) for group in parameter.matrix]
    return Box(tuple(region.start[group[0]] * n for group, n in zip(parameter.matrix, inner)),
               tuple(region.stop[group[0]] * n for group, n in zip(parameter.matrix, inner)))


def _moved_down(box: Box, rows: int) -> Box:
    return box.with_extent(0, box.start[0] + rows, box.stop[0] + rows)


def _without_padding(parameter: Parameter, part: _Part) -> Box:
    shape = _matrix_box(parameter, part.region, parameter.shape).shape
    return Box(part.place.start, tuple(a + n for a, n in zip(part.place.start, shape)))


def _fill(parameter: Parameter, tensor: StoredTensor, part: _Part) -> Iterator[Fill]:
    """The rows of a rank's part past the end of the vocabulary."""
    first = part.place.start[0] + _matrix_box(parameter, part.region, parameter.shape).shape[0]
    if first < part.place.stop[0]:
        yield Fill(tensor, part.place.with_extent(0, first, part.place.stop[0]))


def _order(parameter: Parameter, format: NanotronFormat) -> tuple[tuple[int, ...], ...]:
    """The order of dims in the stored matrix: with interleaved rotary embedding a head is (pair, half)."""
    if not format.rope_interleaved or "half" not in parameter.dims:
        return parameter.matrix
    half, pair = parameter.dims.index("half"), parameter.dims.index("pair")
    swap = {half: pair, pair: half}
    return tuple(tuple(swap.get(dim, dim) for dim in group) for group in parameter.matrix)


def _unsharded_shape(fused: tuple[Parameter, ...], format: NanotronFormat) -> tuple[int, ...]:
    shapes = [_matrix_box(p, Box.whole(padded := _padded_shape(p, format)), padded).stop for p in fused]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _slices_pairs(parts: Sequence[_Part], fused: tuple[Parameter, ...]) -> str:
    """`local#global;...` as `SlicesPair.tuple_to_str` writes it (nanotron/parallel/parameters.py).

    With several chunks both sides name their rows; a lone parameter's local side is all None.
    """
    def text(box: Box, named: int | None) -> str:
        return "|".join(f"{a},{b},None" if dim == named else "None,None,None"
                        for dim, (a, b) in enumerate(zip(box.start, box.stop)))

    split = next(dim for dim, group in enumerate(fused[0].matrix)
                 if fused[0].dims.index(fused[0].split or "") in group)
    return ";".join(f"{text(part.place, split if len(parts) > 1 else None)}#{text(part.origin, split)}"
                    for part in parts)
