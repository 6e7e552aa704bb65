"""README and the command line agree: its commands run, its example is what is printed, every command is in it."""
import json
import os
import re
import subprocess
import sys

import pytest
from documents import ROOT
from sources import make_source

from stream_reshard.cli.flags import COMMANDS, parser_of
from stream_reshard.model.architectures import FAMILIES
from stream_reshard.options import ALLOWABLE

README = (ROOT / "README.md").read_text()


def command(name):
    """The one-line command below `<!-- name command -->`."""
    return re.search(rf"<!-- {name} command -->\n```bash\n(.+)\n```", README)[1]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_command_and_family_is_in_it():
    assert all(f"| `{name}" in README for name in COMMANDS if name != "convert")
    table = README.partition("| family |")[2].partition("\n\n")[0]
    assert all(name in table for name in FAMILIES if name != "MistralForCausalLM")


def test_every_allowable_name_is_explained():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert all(f"| `{name}` |" in page for name in ALLOWABLE)


def test_the_page_of_options_is_made_of_their_declarations():
    made = subprocess.run([sys.executable, "-m", "stream_reshard.cli.reference"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert (ROOT / "docs" / "options.md").read_text() == made
    for name in ("convert", "verify", "inspect", "diff", "demo"):
        for action in parser_of(name)._actions:
            assert action.help and all(flag in made for flag in action.option_strings if flag not in ("-h", "--help"))


def test_example_is_what_the_demo_prints():
    """Line by line, but for the temporary folder, and the disk and memory of this machine."""
    shown = re.search(r"<!-- example -->\n```text\n(.+?)```", README, re.S)[1].splitlines()[1:]
    run = subprocess.run([sys.executable, "-m", "stream_reshard", "demo"], cwd=ROOT, check=True, capture_output=True,
                         text=True)
    blur = [(r"[\d.]+ \w+ free", "N free"), (r"/\S+/stream_reshard_demo_\w+", "FOLDER"),
            (r"[\d.]+ MiB at most with \d+ workers?", "N at most"), (r"[\d.]+ MiB held", "N held")]

    def blurred(text):
        for pattern, name in blur:
            text = re.sub(pattern, name, text)
        return text.splitlines()

    assert blurred(run.stdout) == blurred("\n".join(shown))


def test_the_python_example_runs(tmp_path):
    """In a folder that holds such a source."""
    code = re.search(r"```python\n(.+?)```", README, re.S)[1]
    make_source(tmp_path / "llama-7b", config={"num_key_value_heads": 4})
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert "100%" in ran.stderr and (tmp_path / "llama-7b-tp4" / "config.yaml").exists()


def test_figures_of_the_forward_pass_are_those_of_the_result():
    found = json.loads((ROOT / "benchmarks/results/forward/llama-7b.json").read_text())["forward"]
    page = (ROOT / "docs" / "memory-and-speed.md").read_text()
    section = " ".join(page.partition("## Forward pass")[2].partition("## ")[0].split())
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


def test_every_test_that_a_promise_names_is_there():
    page = (ROOT / "docs" / "promises.md").read_text()
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/[^`]+)`", page))
