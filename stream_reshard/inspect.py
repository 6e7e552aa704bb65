"""Inspect: what a checkpoint folder holds, of either format, from its headers alone."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.small_files import read_json
from stream_reshard.layouts.nanotron_config import MODEL_CONFIG_NAME
from stream_reshard.header import TensorFile, read_header
from stream_reshard.layouts.hf_config import CONFIG_NAME
from stream_reshard.layouts.hugging_face import open_source
from stream_reshard.layouts.nanotron_files import Place, parse_path


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
            "dtypes": layout.count_dtypes(), "num_files": layout.num_files, "nbytes": layout.nbytes,
            "ignored": dict(layout.ignored), "faults": []}


def _dtypes(files: tuple[TensorFile, ...]) -> dict[str, int]:
    return dict(Counter(tensor.dtype for file in files for tensor in file.tensors))


def _inspect_nanotron(root: Path) -> dict[str, Any]:
    problems = Problems()
    paths = sorted(path.relative_to(root).as_posix() for path in (root / "model").rglob("*.safetensors"))
    files = tuple(file for path in paths if (file := problems.collect(read_header, root, path)))
    named = [found for path in paths if (found := problems.collect(parse_path, path))]
    places = [place for _, place in named if place]
    sizes = sorted({(place.num_tp, place.num_pp) for place in places})
    if len(sizes) > 1:
        problems.append(SourceError(f"files of several topologies (TP, PP) stand together: {sizes}"))
    config: dict[str, Any] = {}
    if (root / MODEL_CONFIG_NAME).is_file():
        config = problems.collect(read_json, root, MODEL_CONFIG_NAME) or {}
    else:
        problems.append(SourceError(f"{MODEL_CONFIG_NAME} is missing: Nanotron does not take this folder for a "
                                    f"checkpoint"))
    problems.extend(_holes(named))
    config_class = next((key for key in config if key.startswith("is_")), None)
    return {"format": "Nanotron", "config_class": _scalar(config_class),
            "versions": sorted({v for file in files if (v := dict(file.metadata).get("version"))}),
            "topologies_tp_pp": sizes, "num_ranks": len({(place.pp, place.tp) for place in places}),
            "vocab_size_padded": _scalar(config.get("vocab_size")),
            "tied": _scalar(config.get("tie_word_embeddings")),
            "rope_interleaved": _scalar(config.get("rope_interleaved")),
            "dtypes": _dtypes(files), "num_files": len(paths),
            "nbytes": sum(file.nbytes for file in files), "faults": list(map(str, problems))}


def _scalar(value: Any) -> Any:
    """A number, a truth value or nothing as it is; what a config should not hold there, quoted."""
    return value if value is None or isinstance(value, (bool, int, float)) else quoted(value)


def _holes(named: list[tuple[str, Place | None]]) -> Iterator[SourceError]:
    """Parameters of which some tensor-parallel rank has no file."""
    found: dict[tuple[str, int], set[int]] = {}
    for parameter, place in named:
        if place:
            found.setdefault((parameter, place.num_tp), set()).add(place.tp)
    for (parameter, size), ranks in found.items():
        if len(ranks) != size:
            yield SourceError(f"{quoted(parameter)}: {len(ranks)} of {size} tensor-parallel ranks are there")
