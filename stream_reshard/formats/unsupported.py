"""Settings of a config that no other format here can express.

Each has a name. Where the weights fit all the same, `--allow NAME` converts them; where they do not (a bias that has
no counterpart, another head size) nothing does.
"""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.options import ALLOWABLE


@dataclass(frozen=True)
class Unsupported:
    """One thing that cannot be expressed elsewhere."""

    name: str
    """Name for `--allow`, where the setting may be allowed."""
    text: str
    """The setting, and its fate in a conversion."""
    value: Any = None
    """Whole value of the setting: two configs agree where these are equal."""


def unsupported_problems(settings: Iterable[Unsupported], allowed: Collection[str], name: str) -> Problems:
    """The settings that `--allow` does not accept, one SourceError each; unknown names are UsageErrors. `name` is that
    of the config file."""
    problems = Problems()
    for word in allowed:
        if word not in ALLOWABLE:
            problems.append(UsageError(f"--allow {quoted(word)}: the names are {', '.join(ALLOWABLE)}"))
    for setting in settings:
        if setting.name not in allowed or setting.name not in ALLOWABLE:
            cure = f" (--allow {setting.name} to {ALLOWABLE[setting.name]})" if setting.name in ALLOWABLE else ""
            problems.append(SourceError(f"{name}: {setting.text}{cure}"))
    return problems
