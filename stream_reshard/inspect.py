"""Inspect: what a checkpoint folder holds, of either format, from its headers alone."""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.staging import MARKER_NAME
from stream_reshard.header import TensorFile, read_header
from stream_reshard.layouts.hf_config import CONFIG_NAME, read_json
from stream_reshard.layouts.hugging_face import open_source
from stream_reshard.topology import Rank

_RANK = re.compile(r"_pp-rank-(\d+)-of-(\d+)_tp-rank-(\d+)-of-(\d+)\.safetensors$")


def inspect(root: Path) -> dict[str, Any]:
    """Facts about a folder, for people and for JSON. Raises SourceError where it holds no checkpoint."""
    if (root / "model" / "model").is_dir():
        return _inspect_nanotron(root)
    if (root / CONFIG_NAME).is_file():
        return _inspect_hugging_face(root)
    raise SourceError(f"{quoted(root)} holds neither {CONFIG_NAME} nor model/model: it is no checkpoint known here")


def _inspect_hugging_face(root: Path) -> dict[str, Any]:
    config, layout = open_source(root)
    return {"format": "Hugging Face", "family": config.family.name, "num_parameters": layout.model.num_elements,
            "num_layers": config.model.num_hidden_layers, "heads": config.model.num_attention_heads,
            "kv_heads": config.model.num_key_value_heads, "vocab_size": config.model.vocab_size,
            "tied": config.model.tie_word_embeddings, "rope_theta": config.model.rope_theta,
            "dtypes": _dtypes(layout.files), "num_files": len(layout.files), "nbytes": layout.nbytes,
            "ignored": dict(layout.ignored), "faults": []}


def _dtypes(files: tuple[TensorFile, ...]) -> dict[str, int]:
    return dict(Counter(tensor.dtype for file in files for tensor in file.tensors))


def _inspect_nanotron(root: Path) -> dict[str, Any]:
    problems = Problems()
    paths = sorted(path.relative_to(root).as_posix() for path in (root / "model").rglob("*.safetensors"))
    files = tuple(file for path in paths if (file := problems.collect(read_header, root, path)))
    sizes, ranks = set(), set()
    for match in filter(None, map(_RANK.search, paths)):
        pp, num_pp, tp, num_tp = map(int, match.groups())
        sizes.add((num_tp, num_pp))
        ranks.add(Rank(pp, tp))
    faults = list(map(str, problems))
    if len(sizes) > 1:
        faults.append(f"files of several topologies (TP, PP) stand together: {sorted(sizes)}")
    if not (root / MARKER_NAME).is_file():
        faults.append(f"{MARKER_NAME} is missing: Nanotron does not take this folder for a checkpoint")
        config: dict[str, Any] = {}
    else:
        config = read_json(root, MARKER_NAME)
    faults += _holes(paths)
    return {"format": "Nanotron", "config_class": next((key for key in config if key.startswith("is_")), None),
            "versions": sorted({v for file in files if (v := dict(file.metadata).get("version"))}),
            "topologies_tp_pp": sorted(sizes), "num_ranks": len(ranks), "vocab_size_padded": config.get("vocab_size"),
            "tied": config.get("tie_word_embeddings"), "rope_interleaved": config.get("rope_interleaved"),
            "dtypes": _dtypes(files), "num_files": len(paths), "nbytes": sum(file.nbytes for file in files),
            "faults": faults}


def _holes(paths: list[str]) -> list[str]:
    """Parameters of which some tensor-parallel rank has no file."""
    found: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := _RANK.search(path):
            found.setdefault((path[:match.start()], int(match[4])), set()).add(int(match[3]))
    return [f"{stem}: {len(ranks)} of {size} tensor-parallel ranks are there" for (stem, size), ranks in found.items()
            if len(ranks) != size]
