"""YAML of config.yaml: read without running anything, written as Nanotron writes it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_reshard.errors import SourceError, quoted

CONFIG_YAML = "config.yaml"


def parse_settings(content: bytes) -> Mapping[str, Any]:
    """The settings in config.yaml. Raises SourceError for a content that is no mapping."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types.
        """Loader without merge keys, which can make the value of a short text endless."""

        def flatten_mapping(self, node: Any) -> None:
            """Raises YAMLError for a merge key."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read here; write their values out")

    try:
        value = yaml.load(content, Loader)
    except Exception as error:  # PyYAML's constructors raise errors of many types.
        raise SourceError(f"{CONFIG_YAML} cannot be parsed: {quoted(error)}") from error
    if value is not None and _size(value, 4 * len(content)) > 4 * len(content):
        raise SourceError(f"{CONFIG_YAML} has {len(content)} bytes, but its references repeat values without end; "
                          f"write the values out")
    if not isinstance(value, Mapping):
        raise SourceError(f"{CONFIG_YAML} is empty: no training can start from it" if value is None else
                          f"{CONFIG_YAML} holds a {type(value).__name__}, not a mapping of settings")
    return value


def _size(value: Any, limit: int) -> int:
    """Number of values and characters with references followed, counted up to about `limit`: a few lines of references
    to references can stand for more values than any memory holds."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        total += 1 + len(item) if isinstance(item, (str, bytes, dict, list, tuple, set)) else 1
        if isinstance(item, (dict, list, tuple, set)):
            waiting += [*item.keys(), *item.values()] if isinstance(item, dict) else item
    return total


def settings_text(settings: Mapping[str, Any]) -> bytes:
    """The text of config.yaml as Nanotron saves it (`save_as_yaml`, nanotron/config/config.py), in ASCII."""
    import yaml
    return str(yaml.dump(dict(settings))).encode()
