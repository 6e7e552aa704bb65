"""Steps, samples and tokens in checkpoint_metadata.json, and the sums that Nanotron demands of them when it loads
(TrainingMetadata and load_meta, nanotron/serialize/metadata.py)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stream_reshard.errors import SourceError, quoted
from stream_reshard.formats.nanotron.config import METADATA_NAME
from stream_reshard.storage.small_files import read_json


def read_metas(root: Path, max_nbytes: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the whole document, its metas). Raises SourceError."""
    document = read_json(root, METADATA_NAME, max_nbytes)
    metas = document.get("metas")
    if not isinstance(metas, dict) or metas.get("last_train_step") is None:
        raise SourceError(f"{METADATA_NAME}: metas is {quoted(metas)}, without a last_train_step")
    for key in ("last_train_step", "consumed_train_samples", "consumed_tokens_total"):
        if not isinstance(metas.get(key), (int, type(None))):
            raise SourceError(f"{METADATA_NAME}: {key} is {quoted(metas[key])}, not a whole number")
    return document, metas


def sum_faults(metas: Mapping[str, Any]) -> Iterator[str]:
    """The sums that do not add up: with them Nanotron refuses the checkpoint. Format 1.2 has no stages of data."""
    stages = metas.get("data_stages")
    if stages is None:
        return
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        yield f"{METADATA_NAME}: data_stages is no list of stages"
        return
    samples = [stage.get("consumed_train_samples") for stage in stages]
    folders = [stage.get("consumed_tokens_per_dataset_folder") or {} for stage in stages]
    tokens = [count for folder in folders if isinstance(folder, dict) for count in folder.values()]
    if not all(type(number) is int for number in (*samples, *tokens)):
        yield f"{METADATA_NAME}: samples or tokens of data_stages are no whole numbers"
        return
    for key, parts, where in (("consumed_train_samples", samples, "data_stages"),
                              ("consumed_tokens_total", tokens, "the dataset folders of data_stages")):
        if metas.get(key) is not None and metas[key] != sum(parts):
            yield (f"{METADATA_NAME}: {key} is {quoted(metas[key])}, but {where} add up to {sum(parts)}: Nanotron "
                   f"refuses to load it, as after a training on its dummy dataset")
