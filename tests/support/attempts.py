"""What a run leaves, whole or killed in its middle: made once, and put in its place for every test anew."""
import json
import shutil

from faults import Case, kill

from stream_reshard.destination.staging import lock_of, staging_of

MIDDLE = 200
"""A call in the middle of a run."""


def make_shared(root):
    """A case with copies of what it makes: `whole`, and `half` with its `lock`, of a run that was killed."""
    case = Case(root)
    shutil.copytree(case.destination, root / "whole")
    kill_in_the_middle(case)
    shutil.copytree(staging_of(case.destination), root / "half")
    shutil.copy(lock_of(case.destination), root / "lock")
    return case


def kill_in_the_middle(case):
    """Leave at the destination what a run has done until then."""
    case.clear()
    case.run(kill(MIDDLE, False))
    assert case.tree() is None and len(weights_of(case)) > 5


def place(case, which, where):
    """A copy of `whole` or `half`, and nothing else beside the source; returns where it stands."""
    for path in case.root.iterdir():
        if path.name not in ("hf", "whole", "half", "lock"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(case.root / which, where)
    return where


def place_half(case):
    """What the killed run left, with its lock."""
    place(case, "half", staging_of(case.destination))
    shutil.copy(case.root / "lock", lock_of(case.destination))
    return case


def weights_of(case):
    """The tensor files under their final names in the staging folder."""
    return sorted(staging_of(case.destination).rglob("model_weight*.safetensors"))


def journal_of(case):
    """Where a run notes what it has made durable."""
    return staging_of(case.destination) / "stream_reshard.journal"


def num_kept(case, *flags):
    """Files that the same command takes over from the run before."""
    code, out = case.run(flags=("--json", *flags))
    assert code == 0, out
    return json.loads(out)["num_files_kept"]


def flip(path, at=-1):
    """Damage one bit."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
