"""Settings of a config that another format cannot express.

Each has a name. Where the weights fit nevertheless, `--allow NAME` accepts the setting. Where they do not fit (a bias
without a counterpart, another head size), no option does.
"""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.options import ALLOWABLE


@dataclass(frozen=True)
class Unsupported:
    """A setting that another format cannot express."""

    name: str
    """Name of the setting; `--allow` accepts it if it is in ALLOWABLE."""
    text: str
    """The setting, and the reason why it cannot be converted."""
    value: Any = None
    """Complete value of the setting, by which two configs are compared."""


def unsupported_problems(settings: Iterable[Unsupported], allowed: Collection[str], name: str) -> Problems:
    """A SourceError for each setting that is not allowed, and a UsageError for each unknown name in `allowed`. `name`:
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
