"""The beginnings of all error messages of the package, read from its source: `python tests/docs/messages.py` prints
those that docs/troubleshooting.md does not explain yet.

A placeholder in a message is `…`, in the source and on the page alike.
"""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

_OTHER_NAMES = {"Cause", "Interrupted", "Unsupported", "complain", "_complain", "_Malformed", "_NoRoom"}
"""Calls that make a message, beside those of classes whose name ends in Error."""

_NO_MESSAGES = {"AssertionError", "AttributeError", "KeyError", "OSError", "TypeError"}
"""Faults of a program, and of the system, whose words are not ours."""


def texts(node):
    """The texts that an expression can be, with `…` for what is not known."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else ["…"]
    if isinstance(node, ast.JoinedStr):
        return _joined([_of_format(part) for part in node.values])
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([texts(node.left), texts(node.right)])
    return ["…"]


def _of_format(part):
    """A part of an f-string; a choice between texts is a placeholder, but for one that begins the message."""
    return ["…"] if isinstance(part, ast.FormattedValue) else texts(part)


def _joined(parts):
    found = [""]
    for part in parts:
        found = [before + text for before in found for text in part]
    return found


def name_of(call):
    """The name of what is called, without its module."""
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _is_message(name):
    return name in _OTHER_NAMES or (name.endswith("Error") and name not in _NO_MESSAGES)


def _calls(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_message(name_of(node)))


def messages():
    """{beginning: modules}: what each message of the package begins with, in one form for all its placeholders."""
    found = {}
    for path in sorted((ROOT / "stream_reshard").rglob("*.py")):
        for call in _calls(ast.parse(path.read_text())):
            number = 1 if name_of(call) == "Unsupported" else 0
            for text in texts(call.args[number]) if len(call.args) > number else ():
                text = re.sub(r"…+", "…", re.sub(r"\s+", " ", text)).strip()
                if re.search(r"[a-z]{3}", text.replace("…", " ")):
                    found.setdefault(text, set()).add(str(path.relative_to(ROOT)))
    return found


def strings():
    """Every text of the package, a superset of the messages: some are made by functions that return them."""
    found = set()
    for path in (ROOT / "stream_reshard").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                found |= {re.sub(r"…+", "…", re.sub(r"\s+", " ", text)).strip() for text in texts(node)}
    return found


def entries():
    """The beginnings that the page explains: code in the columns of its tables that are headed "message"."""
    found, column = [], None
    for line in PAGE.read_text().partition("## Messages")[2].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if not line.startswith("|"):
            column = None
        elif "message" in cells:
            column = cells.index("message")
        elif column is not None:
            found += [entry.replace("\\|", "|") for entry in re.findall(r"`([^`]+)`", cells[column])]
    return found


def is_explained(message, explained):
    """Whether an entry of the page is the beginning of a message; backticks cannot stand in code of the page."""
    return any(message.replace("`", "").startswith(entry) for entry in explained)


if __name__ == "__main__":
    explained = entries()
    for message, modules in messages().items():
        if not is_explained(message, explained):
            print(f"{', '.join(sorted(modules))}: {message}")
