"""A Hugging Face folder, opened to be converted."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, StreamReshardError, quoted
from stream_reshard.formats.base import Source
from stream_reshard.layouts.hf_causes import quantization_of
from stream_reshard.layouts.hf_config import CONFIG_NAME, INDEX_NAME
from stream_reshard.layouts.hf_layout import HuggingFaceLayout
from stream_reshard.layouts.hf_limits import dropped, limits
from stream_reshard.layouts.hugging_face import open_folder
from stream_reshard.tensor_file import same_bytes


def open_hugging_face(root: Path, max_nbytes: int, problems: Problems) -> Source | None:
    """Read config and headers, none of more than `max_nbytes`; everything wrong goes to `problems`. None where not even
    the config makes sense."""
    config, model, layout = open_folder(root, max_nbytes, problems)
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
        stray = {path.name for path in root.glob("*.safetensors")} - set(layout.shards)
        if stray := {name for name in stray if not name.startswith("._")}:
            notes.append(f"files that no index names, ignored: {', '.join(map(quoted, sorted(stray)))}")
    files = (CONFIG_NAME, *(layout.shards if layout else ()), INDEX_NAME)
    return Source(root, CONFIG_NAME, config.family, config.model, tuple(limits(config)), tuple(notes), model=model,
                  layout=layout, files=files, ignored=layout.ignored if layout else None)


def _tie_problems(layout: HuggingFaceLayout) -> Iterator[StreamReshardError]:
    """A tied model may store its head or not; where it does, it must be the embedding."""
    for tensor, other in layout.tied():
        if not same_bytes(layout.root, tensor, other):
            yield SourceError(f"{tensor.key} differs from {other.key}, but config.json says tie_word_embeddings; set "
                              f"it to false if the head is its own")
