"""Token ids of two checkpoints: they change no forward pass, but one for padding stops the training of its row."""
from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.destination.manifest import StoredManifest
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.formats.nanotron.config import ids_written, with_known_ids
from stream_reshard.model.architectures import FAMILIES
from stream_reshard.model.parameters import TOKEN_IDS, TokenId, first_id


def with_ids_of(manifest: StoredManifest | None, checkpoint: Checkpoint) -> Checkpoint:
    """A Nanotron checkpoint with the model's token ids from its manifest, if they are there."""
    config, padding_id = checkpoint.config, first_id(checkpoint.config.pad_token_id)
    family = next(family for family in FAMILIES.values() if family.name == config.family)
    known = with_known_ids(config, family, manifest.facts.get("token_ids") if manifest else None)
    model = replace(checkpoint.model, config=known or config)
    return replace(checkpoint, model=model, knows_ids=known is not None, padding_id=padding_id)


def id_differences(source: Checkpoint, copy: Checkpoint, allowed: Collection[str]) -> Iterator[DifferenceError]:
    """Errors for token ids that differ, and for one for padding in a Nanotron config (`ids_written`)."""
    is_exact = source.knows_ids and copy.knows_ids
    ids, source_ids = _ids(copy, is_exact), _ids(source, is_exact)
    for key in TOKEN_IDS:
        is_unknown = key == "pad_token_id" and not is_exact and None in (ids[key], source_ids[key])
        if ids[key] != source_ids[key] and not is_unknown and key not in allowed:
            yield DifferenceError(f"{key} is {quoted(ids[key])} in {quoted(copy.root)}, {quoted(source_ids[key])} in "
                                  f"the source")
    if copy.padding_id is not None and "pad_token_id" not in allowed:
        yield DifferenceError(f"pad_token_id is {copy.padding_id} in {quoted(copy.root)}: with it Nanotron "
                              f"does not train that row on any rank, or does not start; set it to null")


def _ids(checkpoint: Checkpoint, is_exact: bool) -> dict[str, TokenId]:
    """The token ids to compare: all, or those that a Nanotron config can hold."""
    ids: dict[str, TokenId] = {key: getattr(checkpoint.config, key) for key in TOKEN_IDS}
    if not is_exact:
        ids |= ids_written(checkpoint.config) | {"pad_token_id": first_id(ids["pad_token_id"])}
    return {key: value[0] if isinstance(value, tuple) and len(value) == 1 else value for key, value in ids.items()}
