"""A Hugging Face folder, opened to be converted."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, StreamReshardError, quoted
from stream_reshard.formats.base import Described, Source, router_dtype_of
from stream_reshard.formats.hugging_face.causes import quantization_of
from stream_reshard.formats.hugging_face.config import CONFIG_NAME
from stream_reshard.formats.hugging_face.folder import open_folder
from stream_reshard.formats.hugging_face.hub import origin_of
from stream_reshard.formats.hugging_face.index import Shards
from stream_reshard.formats.hugging_face.layout import HuggingFaceLayout
from stream_reshard.formats.hugging_face.pickled import file_notes, kind_of
from stream_reshard.formats.hugging_face.unsupported import dropped, unsupported_settings
from stream_reshard.storage.identity import identities_of
from stream_reshard.storage.source_file import same_bytes


def open_hugging_face(root: Path, max_nbytes: int, problems: Problems) -> Described | None:
    """Read config and headers, none of more than `max_nbytes`; everything wrong goes to `problems`. None where not even
    the config makes sense."""
    kind = kind_of(root)
    seen = identities_of(root, (CONFIG_NAME, kind.index, kind.single))

    def note(shards: Shards) -> None:
        seen.update(identities_of(root, (name for name in shards.names if name not in seen)))

    config, model, layout = open_folder(root, max_nbytes, problems, note)
    if config is None:
        return None
    notes = list(dropped(config))
    if layout is not None:
        problems.extend(_tie_problems(layout))
        notes += [f"ignored tensor {key}: {reason}" for key, reason in layout.ignored.items()]
        notes += layout.notes
        if method := quantization_of(config.raw):
            notes.append(f"config.json speaks of quantised weights ({quoted(method)}), but every weight is there "
                         f"unquantised: that is left over from training, and is left out")
        notes += file_notes(root, kind, layout.shards)
    files = (CONFIG_NAME, *(layout.shards if layout else ()), kind.index)
    described = Described(
        root=root, config_name=CONFIG_NAME, family=config.family, config=config.model, model=model, notes=tuple(notes),
        unsupported=tuple(unsupported_settings(config)),
        identities={name: seen[name] for name in files if name in seen}, origin=origin_of(root),
        router_dtype=router_dtype_of(layout) if layout else None, ignored=layout.ignored if layout else None)
    return described if layout is None else Source(**vars(described), layout=layout)


def _tie_problems(layout: HuggingFaceLayout) -> Iterator[StreamReshardError]:
    """A tied model may store its head or not; where it does, it must be the embedding."""
    for tensor, other in layout.tied():
        if not same_bytes(layout.root, tensor, other):
            yield SourceError(f"{tensor.key} differs from {other.key}, but config.json says tie_word_embeddings; set "
                              f"it to false if the head is its own")
