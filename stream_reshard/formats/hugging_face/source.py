"""A Hugging Face folder, opened for a conversion."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, StreamReshardError, quoted
from stream_reshard.formats.base import Described, Source, router_dtype_of
from stream_reshard.formats.config_json import CONFIG_NAME, quantization_of
from stream_reshard.formats.config_json_limits import dropped, unsupported_settings
from stream_reshard.formats.hugging_face.folder import open_folder
from stream_reshard.formats.hugging_face.hub import origin_of
from stream_reshard.formats.hugging_face.index import Shards
from stream_reshard.formats.hugging_face.layout import HuggingFaceLayout
from stream_reshard.formats.hugging_face.pickled import file_notes, kind_of
from stream_reshard.model.truncation import Truncate, untruncated
from stream_reshard.storage.identity import identities_of
from stream_reshard.storage.source_file import same_bytes


def open_hugging_face(root: Path, max_nbytes: int, problems: Problems,
                      truncate: Truncate = untruncated) -> Described | None:
    """Read config and headers, each of at most `max_nbytes`, of the layers that `truncate` takes. All problems are
    added to `problems`; with problems in the config, the result is None."""
    kind = kind_of(root)
    seen, passed_over = identities_of(root, (CONFIG_NAME, kind.index, kind.single)), set[str]()

    def add_identities(shards: Shards) -> None:
        seen.update(identities_of(root, (name for name in shards.names if name not in seen)))
        passed_over.update(shards.index.passed_over)

    config, model, layout = open_folder(root, max_nbytes, problems, add_identities, truncate)
    if config is None:
        return None
    notes = list(dropped(config))
    if layout is not None:
        problems.extend(_tie_problems(layout))
        notes += [f"ignored tensor {key}: {reason}" for key, reason in layout.ignored.items()]
        notes += layout.notes
        if method := quantization_of(config.raw):
            notes.append(f"config.json names a quantisation ({quoted(method)}), but no weight is quantised; the "
                         f"setting is left out")
        notes += file_notes(root, kind, {*layout.shards, *passed_over})
    files = (CONFIG_NAME, *(layout.shards if layout else ()), kind.index)
    described = Described(
        root=root, config_name=CONFIG_NAME, family=config.family, config=config.model, model=model, notes=tuple(notes),
        unsupported=tuple(unsupported_settings(config)),
        identities={name: seen[name] for name in files if name in seen}, origin=origin_of(root),
        router_dtype=router_dtype_of(layout) if layout else None, ignored=layout.ignored if layout else None)
    return described if layout is None else Source(**vars(described), layout=layout)


def _tie_problems(layout: HuggingFaceLayout) -> Iterator[StreamReshardError]:
    """Stored tensors of tied parameters that differ from the tensor they are tied to."""
    for tensor, other in layout.tied():
        if not same_bytes(layout.root, tensor, other):
            yield SourceError(f"{tensor.key} differs from {other.key}, but tie_word_embeddings in config.json is true; "
                              f"set it to false if the model has a head of its own")
