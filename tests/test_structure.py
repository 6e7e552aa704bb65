"""The structure holds: imports run one way, files and functions stay short, and a plain run never imports torch."""
import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "stream_reshard"

ORDER = ("errors", "box", "topology", "stop", "folder", "durable", "json_text", "stand_ins", "small_files",
         "identity", "json_stream", "header", "names", "model", "architectures", "machine", "memory", "manifest",
         "contents", "access", "lock", "journal", "removal", "layouts", "transfer", "alignment", "proof", "plan",
         "casts", "tensor_file", "sharing", "target_file", "lanes", "moving", "companions", "staging", "jobs",
         "engines", "destination", "execute", "verify", "forward", "source_digests", "documents", "options",
         "formats", "notes", "convert", "report", "inspect", "diff", "api", "demo", "flags", "cli", "__main__")
"""A module imports only what stands before it."""


def imported(path):
    """Names of this package's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stream_reshard":
            rest = node.module.split(".")[1:]
            yield from rest[:1] or [alias.name for alias in node.names if not alias.name.startswith("__")]


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imported(path):
            assert ORDER.index(other) < ORDER.index(own) or other == own, f"{path.name} imports {other}"


def test_the_command_line_uses_nothing_but_the_interface():
    """What it does, others can do: beside words and signals it has no means of its own."""
    assert set(imported(PACKAGE / "cli.py")) <= {"api", "flags", "errors", "stop", "memory", "staging", "demo",
                                                 "verify", "diff"}
    source = (PACKAGE / "cli.py").read_text()
    for module in ("verify", "diff"):
        assert f"from stream_reshard.{module} import lines\n" in source


def test_files_and_functions_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"


def test_a_plain_run_does_not_import_torch(tmp_path):
    code = ("import sys; from stream_reshard.cli import main; code = main(['demo', '--quiet']); "
            "assert 'torch' not in sys.modules, 'torch'; sys.exit(code)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
