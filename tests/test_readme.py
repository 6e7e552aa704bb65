"""README and the command line agree: its commands run, and every flag, command and allowable name is in it."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import make_source

from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.cli.flags import COMMANDS, parser_of
from stream_reshard.options import ALLOWABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(name):
    """The one-line command below `<!-- name command -->`."""
    return re.search(rf"<!-- {name} command -->\n```bash\n(.+)\n```", README)[1]


def test_every_command_and_allowable_name_is_documented():
    assert all(f"| `{name}" in README for name in COMMANDS)
    assert all(f"| `{name}` |" in README for name in ALLOWABLE)


def test_the_page_of_options_is_made_of_their_declarations():
    made = subprocess.run([sys.executable, "-m", "stream_reshard.cli.reference"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert (ROOT / "docs" / "options.md").read_text() == made
    for name in ("convert", "verify", "inspect", "diff", "demo"):
        for action in parser_of(name)._actions:
            assert action.help and all(flag in made for flag in action.option_strings if flag not in ("-h", "--help"))


def test_example_is_what_the_demo_prints():
    """Line by line, but for the temporary folder and what this machine held in memory."""
    shown = re.search(r"<!-- example -->\n```text\n(.+?)```", README, re.S)[1].splitlines()[1:]
    run = subprocess.run([sys.executable, "-m", "stream_reshard", "demo"], cwd=ROOT, check=True, capture_output=True,
                         text=True)
    blur = [(r"[\d.]+ \w+ free", "N free"), (r"/\S+/stream_reshard_demo_\w+", "FOLDER"),
            (r"(reserved|projected) [\d.]+", r"\1 N"), (r"\d+ workers", "N workers")]
    for pattern, name in blur:
        shown = [re.sub(pattern, name, line) for line in shown]
    got = run.stdout
    for pattern, name in blur:
        got = re.sub(pattern, name, got)
    assert got.splitlines() == shown


def test_the_python_example_runs(tmp_path):
    """In a folder that holds such a source."""
    code = re.search(r"```python\n(.+?)```", README, re.S)[1]
    make_source(tmp_path / "llama-7b", config={"num_key_value_heads": 4})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert "100%" in told.stdout and (tmp_path / "llama-7b-tp4" / "config.yaml").exists()


def test_the_other_commands_run(tmp_path):
    """The commands of the introduction, one after the other, as they stand there."""
    write_random_source(tmp_path / "hf", CONFIG | {"num_key_value_heads": 8, "num_hidden_layers": 4})
    shown = re.findall(r"^    python (-m stream_reshard .*SRC DST.*)$", README, re.M)
    assert len(shown) == 5
    folders = [("hf", "nt"), ("nt", "back"), ("nt", "across"), ("nt", "back"), ("hf", "nt")]
    for words, (source, destination) in zip(shown, folders):
        line = words.replace("SRC", str(tmp_path / source)).replace("DST", str(tmp_path / destination))
        subprocess.run([sys.executable, *line.split()], cwd=ROOT, check=True, capture_output=True)


def test_figures_of_the_forward_pass_are_those_of_the_result():
    found = json.loads((ROOT / "benchmarks/results/forward/llama-7b.json").read_text())["forward"]
    section = " ".join(README.partition("## Forward")[2].partition("## ")[0].split())
    assert f"{found['num_tokens']} tokens took {found['seconds']:.0f} s and {found['peak_nbytes'] / 2**20:.0f} MiB" in section
    assert f"{found['memory']['projected'] / 2**20:.0f} MiB were projected" in section
    assert f"difference was {max(layer['relative'] for layer in found['layers']):.1e}" in section


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
