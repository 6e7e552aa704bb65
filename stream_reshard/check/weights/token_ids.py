"""Token ids of two checkpoints: they change no forward pass, but one of them stops a training or a row of it."""
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
    """A Nanotron checkpoint with the model's token ids from its manifest, where that holds them."""
    config, padding_id = checkpoint.config, first_id(checkpoint.config.pad_token_id)
    family = next(family for family in FAMILIES.values() if family.name == config.family)
    known = with_known_ids(config, family, manifest.facts.get("token_ids") if manifest else None)
    model = replace(checkpoint.model, config=known or config)
    return replace(checkpoint, model=model, knows_ids=known is not None, padding_id=padding_id)


def id_differences(source: Checkpoint, copy: Checkpoint, allowed: Collection[str]) -> Iterator[DifferenceError]:
    """Token ids in which two checkpoints differ, and one for padding where Nanotron must have none (`ids_written`)."""
    is_exact = source.knows_ids and copy.knows_ids
    mine, theirs = _ids(copy, is_exact), _ids(source, is_exact)
    for key in TOKEN_IDS:
        is_unknown = key == "pad_token_id" and not is_exact and None in (mine[key], theirs[key])
        if mine[key] != theirs[key] and not is_unknown and key not in allowed:
            yield DifferenceError(f"{key} is {quoted(mine[key])} in {quoted(copy.root)}, {quoted(theirs[key])} in the "
                                  f"source")
    if copy.padding_id is not None and "pad_token_id" not in allowed:
        yield DifferenceError(f"pad_token_id is {copy.padding_id} in {quoted(copy.root)}: Nanotron would not train "
                              f"that row of any rank's embedding, or not start; it must be null")


def _ids(checkpoint: Checkpoint, is_exact: bool) -> dict[str, TokenId]:
    """The token ids as they are compared: whole, or as far as a Nanotron config holds them."""
    ids: dict[str, TokenId] = {key: getattr(checkpoint.config, key) for key in TOKEN_IDS}
    if not is_exact:
        ids |= ids_written(checkpoint.config) | {"pad_token_id": first_id(ids["pad_token_id"])}
    return {key: value[0] if isinstance(value, tuple) and len(value) == 1 else value for key, value in ids.items()}
