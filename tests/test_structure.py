"""The structure holds: imports run one way, files and functions stay short, and a plain run never imports torch."""
import ast
import subprocess
import sys
from pathlib import Path

from stream_reshard import WINGS

PACKAGE = Path(__file__).parents[1] / "stream_reshard"
FORMATS = ("hugging_face", "nanotron", "meta")


def modules():
    """(path, its parts below the package) of every module but the package's own face."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            yield path, parts


def imported(path):
    """The modules of this package that a file imports, as parts below the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stream_reshard":
            rest = tuple(node.module.split(".")[1:])
            yield from ((*rest, alias.name) for alias in node.names if not alias.name.startswith("__"))


def test_every_entry_is_a_wing():
    """Folders that an older checkout left without a module in them do not count."""
    entries = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
    entries -= {"__init__", "__main__"}
    assert entries == set(WINGS) and len(WINGS) < 16


def test_imports_run_one_way():
    """A wing imports only what stands behind it in the one list."""
    for path, (own, *_) in modules():
        for other, *_ in imported(path):
            assert WINGS.index(other) >= WINGS.index(own), f"{path} imports {other}"


def test_what_wings_know_of_each_other():
    """No format imports another; who moves bytes knows layouts, not formats; the forward pass shares nothing with the planner."""
    for path, parts in modules():
        for other in imported(path):
            if parts[0] == "formats" and parts[1] in FORMATS:
                assert other[:1] != ("formats",) or other[1] not in set(FORMATS) - {parts[1]}, path
            if parts[0] == "run" and other[0] == "formats":
                assert other[1] == "layout", path
            if parts[:2] == ("check", "forward"):
                assert other[0] != "plan" and (other[0] != "formats" or other[1] == "causes"), path


def test_the_command_line_uses_nothing_but_the_interface():
    """What it does, others can do: beside words and signals it has no means of its own."""
    wings = {other[0] for other in imported(PACKAGE / "cli" / "commands.py")}
    assert wings <= {"api", "cli", "errors", "machine", "destination", "check", "options", "report"}
    assert {other for other in imported(PACKAGE / "cli" / "commands.py") if other[0] in ("destination", "check")} <= {
        ("destination", "staging", "staging_of"), ("check", "forward", "report", "ForwardResult"),
        ("check", "forward", "ForwardPlan"), ("check", "weights", "scope", "allowable")}


def test_files_and_functions_are_short():
    """Those of the tests too."""
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) < 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"


def test_a_plain_run_does_not_import_torch(tmp_path):
    code = ("import sys; from stream_reshard.cli import main; code = main(['demo', '--quiet']); "
            "assert 'torch' not in sys.modules, 'torch'; sys.exit(code)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
