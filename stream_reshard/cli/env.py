"""Versions and limits of this machine, for a report of a bug."""
from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from stream_reshard import __version__
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import file_system_of, free_descriptors, group_limit, num_cores
from stream_reshard.machine.memory import human
from stream_reshard.report import Report

_PACKAGES = ("numpy", "safetensors", "tqdm", "psutil", "xxhash", "PyYAML", "torch", "tokenizers", "transformers",
             "nanotron")


def environment() -> Report:
    """Versions of this tool, Python, the kernel and packages; cores, memory, open files, file system."""
    group = group_limit()
    if group is not None and group > psutil.virtual_memory().total:
        group = None
    facts: dict[str, Any] = {
        "stream_reshard": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "num_cores": num_cores(), "memory_nbytes": memory.machine_limit(), "group_limit_nbytes": group,
        "num_free_descriptors": free_descriptors(), "file_system": file_system_of(Path(os.getcwd()))}
    shown = facts | {"packages": ", ".join(f"{name} {found}" for name, found in facts["packages"].items()),
                     "memory_nbytes": human(facts["memory_nbytes"]),
                     "group_limit_nbytes": "none" if group is None else human(group)}
    return Report(facts, tuple(f"{name.removesuffix('_nbytes').replace('_', ' '):<21} {value}"
                               for name, value in shown.items()))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
