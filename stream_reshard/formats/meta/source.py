"""A folder of Meta's parts, opened for a conversion."""
from __future__ import annotations

from pathlib import Path

from stream_reshard.errors import Problems
from stream_reshard.formats.base import Described, Source
from stream_reshard.formats.config_json import CONFIG_NAME
from stream_reshard.formats.config_json_limits import dropped, unsupported_settings
from stream_reshard.formats.meta.folder import found_parts, open_folder
from stream_reshard.formats.meta.params import PARAMS_NAME
from stream_reshard.model.truncation import Truncate, untruncated
from stream_reshard.storage.identity import identities_of


def open_meta(root: Path, max_nbytes: int, problems: Problems, truncate: Truncate = untruncated) -> Described | None:
    """Read settings and parts, of the layers that `truncate` takes, each text of at most `max_nbytes`. All problems are
    added to `problems`; with problems in the settings, the result is None."""
    seen = identities_of(root, (CONFIG_NAME, PARAMS_NAME, *found_parts(root)))
    config, model, layout = open_folder(root, max_nbytes, problems, truncate)
    if config is None:
        return None
    notes = dropped(config)
    if layout is not None:
        notes.append("weights are read from Meta's parts (consolidated.*.pth) without unpickling them")
        notes += [f"ignored tensor {key}: {reason}" for key, reason in layout.ignored.items()]
    read = (config.name, *(layout.parts if layout else ()))
    described = Described(
        root=root, config_name=config.name, family=config.family, config=config.model, model=model, notes=tuple(notes),
        unsupported=tuple(unsupported_settings(config)), ignored=layout.ignored if layout else None,
        identities={name: seen[name] for name in read if name in seen})
    return described if layout is None else Source(**vars(described), layout=layout)
