"""Origin of a folder in the cache of Hugging Face's hub."""
from __future__ import annotations

import re
from pathlib import Path

_REPOSITORY = re.compile(r"models--(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def origin_of(root: Path) -> dict[str, str] | None:
    """{"repo": "org/name", "commit": sha} of a folder `models--org--name/snapshots/SHA` in the hub's cache; None for
    any other folder. The layout is that of huggingface_hub (file_download.py, `repo_folder_name`)."""
    name = _REPOSITORY.fullmatch(root.parent.parent.name)
    if not name or root.parent.name != "snapshots" or not _COMMIT.fullmatch(root.name):
        return None
    return {"repo": name[1].replace("--", "/"), "commit": root.name}
