"""What is refused: the exit code, what is said, and that nothing is left behind."""
from running import call

from stream_reshard.cli import main


def code_of(arguments):
    """What the command ends with; argparse raises SystemExit. A test process holds much."""
    words = list(map(str, arguments))
    try:
        return main(words if "--max-memory" in words else [*words, "--max-memory", "4GiB"])
    except SystemExit as stop:
        return stop.code


def listing(root):
    """Everything below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refuse(capsys, tmp_path, code, words, flags=(), source="hf", destination="nt"):
    """The conversion is refused with this code and these words; whatever was there before is still all there is."""
    before = listing(tmp_path)
    assert code_of([tmp_path / source, tmp_path / destination, *flags]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert listing(tmp_path) == before
    return [line.removeprefix("error: ") for line in err.splitlines()]


def told(capsys, *arguments, code=3):
    """The one line that a command says."""
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and len(err) < 900, err
    assert err[:-1].isprintable() and err.isascii(), err
    return err
