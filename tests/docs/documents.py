"""The documents of the repository, their blocks of code, and a room in which their commands run.

Commands that need a network or GPUs (`hf`, `git clone`, `torchrun`, `pip`, `sbatch`) are replaced by stand-ins that
refuse any spelling which the real programs would not take.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

def blocks(text, languages):
    """(line before it, language, code) of every block of code in one of these languages, in their order."""
    found = re.finditer(rf"^([^\n]*)\n```({'|'.join(languages)})\n(.*?)^```$", text, re.M | re.S)
    return [match.groups() for match in found]


def prepare(room):
    """Environment variables for commands that run in `room`: there is a .venv as the demo command makes it."""
    programs = room / ".venv" / "bin"
    programs.mkdir(parents=True)
    started = {path.name: f"'{path}'" for path in STAND_INS.iterdir() if path.is_file()}
    for name, what in (started | {"stream-reshard": "-m stream_reshard"}).items():
        (programs / name).write_text(f"#!/bin/sh\nexec '{sys.executable}' {what} \"$@\"\n")
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f"export PATH='{programs}':\"$PATH\"\n")
    paths = (str(ROOT), str(ROOT / "tests" / "support"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1", "VENV": str(room / ".venv"),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def run(code, room, env):
    """Run a script of the documents in the room; every command of it must end well."""
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=room, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"
    return ran
