"""Inspect: the contents of a checkpoint folder of any format, from its headers; on request its values too."""
from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream_reshard.check.inspect_states import state_facts
from stream_reshard.destination.journal import JOURNAL_NAME
from stream_reshard.destination.manifest import MANIFEST_NAME, Manifest, read_manifest
from stream_reshard.errors import Problems, SourceError, explained, quoted
from stream_reshard.formats.causes import above, no_checkpoint
from stream_reshard.formats.config_json import CONFIG_NAME
from stream_reshard.formats.hugging_face.folder import open_folder
from stream_reshard.formats.layout import Layout
from stream_reshard.formats.meta.folder import is_meta
from stream_reshard.formats.meta.folder import open_folder as open_parts
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME, NanotronModelConfig, read_model_config
from stream_reshard.formats.nanotron.folder import litter_notes
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.source import agreeing, layout_of_files, scan
from stream_reshard.formats.nanotron.target import blocks_text
from stream_reshard.formats.nanotron.weight_files import WeightFile
from stream_reshard.formats.registry import is_nanotron
from stream_reshard.machine.stop import Stop
from stream_reshard.model.parameters import ModelConfig
from stream_reshard.model.truncation import recorded
from stream_reshard.storage.header import MAX_HEADER_NBYTES, StoredTensor
from stream_reshard.storage.small_files import check_readable
from stream_reshard.storage.source_file import SourceFile

MAX_LISTED = 20
"""Limit on listed faults (the rest are counted), on stages, and on tensors with NaN or infinite values."""

_MAX_NBYTES = 10 * 2**20
"""Cap on each header and small file."""

_BLOCK_NBYTES = 2**20

_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0 << 48}
"""The exponent bits of each dtype: all set mean an infinity, or NaN if a fraction bit is set too."""


def inspect(root: Path, values: bool = False, stop: Stop | None = None) -> dict[str, Any]:
    """Facts about a folder, for people and for JSON. With `values` every weight is read, in bounded memory, and NaN and
    infinities are counted. Raises SourceError for a folder without a checkpoint."""
    check_readable(root)
    if is_nanotron(root):
        facts, tensors = _inspect_nanotron(root)
    elif is_meta(root):
        facts, tensors = _inspect_meta(root)
    elif os.path.isfile(root / CONFIG_NAME):
        facts, tensors = _inspect_hugging_face(root)
    else:
        raise no_checkpoint(root)
    facts["is_unfinished"] = os.path.lexists(root / JOURNAL_NAME)
    return facts | (_value_facts(root, tensors, stop or Stop()) if values else {})


def _inspect_hugging_face(root: Path) -> tuple[dict[str, Any], Iterator[StoredTensor]]:
    problems = Problems()
    found, _, opened = open_folder(root, MAX_HEADER_NBYTES, problems)
    config, layout = problems.required(found), problems.required(opened)
    facts = {"checkpoint": "Hugging Face", **_model_facts(config.model, layout), "vocab_size": config.model.vocab_size,
             "dtypes": layout.count_dtypes(), "num_files": layout.num_files, "nbytes": layout.nbytes,
             "ignored": dict(layout.ignored), "has_manifest": (root / MANIFEST_NAME).is_file(), "faults": [],
             "notes": [*config.notes, *layout.notes]}
    return facts, layout.tensors()


def _inspect_meta(root: Path) -> tuple[dict[str, Any], Iterator[StoredTensor]]:
    problems = Problems()
    found, _, opened = open_parts(root, MAX_HEADER_NBYTES, problems)
    config, layout = problems.required(found), problems.required(opened)
    facts = {"checkpoint": "Meta", **_model_facts(config.model, layout), "vocab_size": config.model.vocab_size,
             "rope_interleaved": True, "dtypes": dict(Counter(tensor.dtype for tensor in layout.tensors())),
             "num_files": layout.num_files, "nbytes": layout.nbytes, "ignored": dict(layout.ignored),
             "has_manifest": False, "faults": [], "notes": list(config.notes)}
    return facts, layout.tensors()


def _model_facts(config: ModelConfig, layout: Layout | None) -> dict[str, Any]:
    return {"family": config.family, "num_parameters": layout.model.num_elements if layout else None,
            "num_layers": config.num_hidden_layers, "whole_num_layers": config.whole_num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads, "tied": config.tie_word_embeddings,
            "rope_theta": config.rope_theta, "no_rope_layer": config.no_rope_layer}


def _inspect_nanotron(root: Path) -> tuple[dict[str, Any], Iterator[StoredTensor]]:
    problems = Problems()
    if os.path.isfile(root / MODEL_CONFIG_NAME):
        config = problems.collect(read_model_config, root, _MAX_NBYTES)
    elif cause := above(root):
        raise cause
    else:
        config = None
        problems.append(SourceError(f"{MODEL_CONFIG_NAME} is missing: without it Nanotron sees no checkpoint here"))
    manifest = problems.collect(read_manifest, root)
    if config and manifest:
        config = replace(config, model=recorded(config.model, manifest.facts))
    files = scan(root, _MAX_NBYTES, problems)
    layout = problems.collect(_layout, root, config, manifest, files) if config else None
    if config is None:
        problems.extend(_holes(files.values()))
    state, state_faults, state_notes = state_facts(root, _MAX_NBYTES)
    faults = [*map(str, explained(problems)), *state_faults]
    return {"checkpoint": "Nanotron", **_nanotron_facts(config, manifest, layout), **_file_facts(files),
            **state, "has_manifest": manifest is not None,
            "faults": faults[:MAX_LISTED] + [f"and {len(faults) - MAX_LISTED} more"] * (len(faults) > MAX_LISTED),
            "notes": [*litter_notes(root), *state_notes]}, (file.tensor for file in files.values())


def _layout(root: Path, config: NanotronModelConfig, manifest: Manifest | None,
            files: Mapping[str, WeightFile]) -> NanotronLayout:
    """The layout that the headers describe. Its vocabulary includes the padding where no manifest knows better, as when
    a training has moved. Raises Refused."""
    known, padded = manifest.facts["vocab_size"] if manifest else None, config.model.vocab_size
    return layout_of_files(root, config, min(known or padded, padded), agreeing(root, files))


def _nanotron_facts(config: NanotronModelConfig | None, manifest: Manifest | None,
                    layout: NanotronLayout | None) -> dict[str, Any]:
    if config is None:
        return {}
    interleaved = layout.rules.rope_interleaved if layout else config.rope_interleaved
    return {"config_class": config.config_class, **_model_facts(config.model, layout),
            "vocab_size": manifest.facts["vocab_size"] if manifest else None,
            "vocab_size_padded": config.model.vocab_size, "rope_interleaved": interleaved}


def _file_facts(files: Mapping[str, WeightFile]) -> dict[str, Any]:
    ranks = [file.rank for file in files.values() if file.rank]
    blocks: dict[int, dict[str, None]] = defaultdict(dict)
    for file in sorted(files.values(), key=_depth):
        if file.rank:
            blocks[file.rank.pp].setdefault(file.parameter.split(".pp_block")[0])
    return {"versions": sorted({file.version for file in files.values() if file.version}),
            "topologies_tp_pp": sorted({(rank.num_tp, rank.num_pp) for rank in ranks}),
            "num_ranks": len({(rank.pp, rank.tp) for rank in ranks}),
            "stages": {str(stage): blocks_text(names) for stage, names in sorted(blocks.items())[:MAX_LISTED]},
            "dtypes": dict(Counter(file.tensor.dtype for file in files.values())), "num_files": len(files),
            "nbytes": sum(file.file.nbytes for file in files.values())}


def _depth(file: WeightFile) -> tuple[int, int]:
    """Sort key for the position of a block in the model: embedding, layers by number, the rest."""
    name, _, layer = file.parameter.split(".pp_block")[0].partition(".")
    first = {"token_position_embeddings": 0, "decoder": 1}.get(name, 2)
    return first, int(layer) if layer.isdigit() and len(layer) < 9 else 0


def _holes(files: Iterable[WeightFile]) -> Iterator[SourceError]:
    """An error for each parameter that lacks the file of a tensor-parallel rank."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if file.rank:
            found.setdefault((file.parameter, file.rank.num_tp), set()).add(file.rank.tp)
    for (parameter, size), ranks in found.items():
        if len(ranks) != size:
            yield SourceError(f"{quoted(parameter)}: {len(ranks)} of {size} tensor-parallel ranks have a file")


def _value_facts(root: Path, tensors: Iterator[StoredTensor], stop: Stop) -> dict[str, Any]:
    """Counts of NaN and infinite weights, and the tensors that hold them."""
    num_nan = num_infinite = 0
    listed: dict[str, list[int]] = {}
    with stop.awaited():
        for tensor in tensors:
            nan, infinite = _count(root, tensor, stop)
            num_nan, num_infinite = num_nan + nan, num_infinite + infinite
            if (nan or infinite) and len(listed) < MAX_LISTED:
                listed[f"{tensor.file}: {tensor.key}"] = [nan, infinite]
    return {"num_nan": num_nan, "num_infinite": num_infinite, "nan_and_infinite": listed}


def _count(root: Path, tensor: StoredTensor, stop: Stop) -> tuple[int, int]:
    """(number of NaN, of infinities) in a tensor."""
    import numpy as np
    if tensor.dtype not in _EXPONENT:
        return 0, 0
    exponent, kind = _EXPONENT[tensor.dtype], np.dtype(f"u{tensor.itemsize}")
    fraction = kind.type((1 << 8 * tensor.itemsize - 1) - 1 - exponent)
    nan = infinite = 0
    with SourceFile(root, tensor.file) as file:
        buffer = memoryview(bytearray(min(_BLOCK_NBYTES, tensor.nbytes)))
        for offset in range(0, tensor.nbytes, _BLOCK_NBYTES):
            stop.check()
            view = buffer[:tensor.nbytes - offset]
            file.read_into(view, tensor.begin + offset)
            file.release(tensor.begin + offset, len(view))
            bits = np.frombuffer(view, kind)
            special = bits[(bits & kind.type(exponent)) == exponent]
            is_nan = np.count_nonzero(special & fraction)
            nan, infinite = nan + is_nan, infinite + len(special) - is_nan
    return int(nan), int(infinite)
