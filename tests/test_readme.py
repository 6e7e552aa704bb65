"""README and the command line agree: its commands run, and every flag, command and allowable name is in it."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stream_reshard.flags import COMMANDS, parser_of
from stream_reshard.layouts.limits import ALLOWABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(name):
    """The one-line command below `<!-- name command -->`."""
    return re.search(rf"<!-- {name} command -->\n```bash\n(.+)\n```", README)[1]


def test_every_flag_and_command_is_documented():
    for name in ("convert", *COMMANDS):
        for action in parser_of(name)._actions:
            for flag in action.option_strings:
                assert flag == "-h" or f"`{flag}" in README, flag
    for name in COMMANDS:
        assert f"| `{name}" in README
    for name in ALLOWABLE:
        assert f"| `{name}` |" in README


def test_example_is_what_the_demo_prints():
    """Line by line, but for the temporary folder and what this machine held in memory."""
    shown = re.search(r"<!-- example -->\n```text\n(.+?)```", README, re.S)[1].splitlines()[1:]
    run = subprocess.run([sys.executable, "-m", "stream_reshard", "demo"], cwd=ROOT, check=True, capture_output=True,
                         text=True)
    blur = [(r"[\d.]+ \w+ free", "N free"), (r"/\S+/stream_reshard_demo_\w+", "FOLDER"),
            (r"(reserved|projected) [\d.]+", r"\1 N")]
    for pattern, name in blur:
        shown = [re.sub(pattern, name, line) for line in shown]
    got = run.stdout
    for pattern, name in blur:
        got = re.sub(pattern, name, got)
    assert got.splitlines() == shown


def test_test_command_is_the_one_that_ci_runs():
    assert "pytest" in command("test")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.heavy
def test_demo_command_works_on_a_fresh_machine(tmp_path):
    """The core installs without torch, under 200 MB."""
    env = {**os.environ, "VENV": str(tmp_path / "venv")}
    env.pop("PYTHONPATH", None)
    subprocess.run(["bash", "-c", command("demo")], cwd=ROOT, env=env, check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert not (packages / "torch").exists()
    nbytes = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())
    assert nbytes < 200e6, f"{nbytes} bytes"
