"""The package as others get it: source and wheel build, a wheel holds the package alone, and it works with the oldest
dependencies that it declares and on the newest Python that is here."""
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from a copy of what is under version control."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, files):
        path = source / name.decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name.decode(), path)
    subprocess.run([sys.executable, "-m", "build", "-q", "-o", target, source], check=True)
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


@pytest.mark.heavy
def test_descriptions_are_those_of_a_package_index(built):
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True)


@pytest.mark.heavy
def test_a_wheel_holds_the_package_alone(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"stream_reshard", built[0].name.rsplit("-", 3)[0] + ".dist-info"}
    assert "stream_reshard/py.typed" in names
    shells = {name.rpartition("/")[2] for name in names if name.startswith("stream_reshard/cli/completions/")}
    assert shells == {"__init__.py", "stream-reshard.bash", "_stream-reshard"}


@pytest.mark.heavy
def test_a_source_distribution_has_no_half_of_the_tests(built):
    names = {name.partition("/")[2] for name in tarfile.open(built[1]).getnames()}
    assert {"README.md", "LICENSE", "setup.cfg", "stream_reshard/api.py"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def lowest():
    """The lowest versions of the core's dependencies that setup.cfg declares."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return [re.sub(r" *>= *", "==", line) for line in config["options"]["install_requires"].split("\n") if line]


def python(version):
    """A Python of this version; None where there is none. A shim that leads nowhere is none."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for path in map(str, filter(None, found)):
        if not subprocess.run([path, "--version"], capture_output=True).returncode:
            return path
    return None


def works(tmp_path, interpreter, wheel, constraints):
    """Convert, verify, back, verify, inspect in a new environment; no warning of what will be gone."""
    subprocess.run([interpreter, "-m", "venv", tmp_path / "venv"], check=True)
    run = tmp_path / "venv" / "bin" / "python"
    subprocess.run([run, "-m", "pip", "install", "-q", wheel, *constraints], check=True)
    demo = tmp_path / "demo"
    for words in (["demo", "--keep", demo], ["verify", demo / "llama", demo / "nanotron"],
                  [demo / "nanotron", demo / "back", "--to", "hf", "--verify"], ["inspect", demo / "back", "--values"],
                  ["diff", demo / "llama", demo / "back"], ["completion", "bash"], ["env", "--json"]):
        subprocess.run([run, "-W", "error::DeprecationWarning", "-m", "stream_reshard", *words], check=True,
                       stdout=subprocess.DEVNULL, cwd=tmp_path)


@pytest.mark.heavy
@pytest.mark.skipif(python("3.10") is None, reason="no Python 3.10 is here")
def test_the_lowest_versions_work(tmp_path, built):
    works(tmp_path, python("3.10"), built[0], lowest())


@pytest.mark.heavy
def test_the_newest_python_works(tmp_path, built):
    newest = next(filter(None, map(python, ("3.14", "3.13", "3.12"))), sys.executable)
    works(tmp_path, newest, built[0], [])
