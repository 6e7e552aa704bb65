"""Private stays private: an output lets nobody do more than every file that it is made of or replaces; and what another
user has prepared is not taken up."""
import os
import stat

import pytest
from faults import FLAGS
from sources import make_source

from stream_reshard.cli import main
from stream_reshard.destination.staging import lock_of, staging_of

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def folder_mode(mode):
    """Of a folder whose files have a mode: who may read may enter."""
    return 0o700 | mode & 0o066 | (mode & 0o044) >> 2


def converted(source, destination, umask, *flags):
    """Exit code of a conversion under a umask."""
    before = os.umask(umask)
    try:
        return main([str(source), str(destination), *FLAGS, *flags])
    finally:
        os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("modes", [(0o600, 0o600), (0o644, 0o600), (0o640, 0o644), (0o660, 0o664), (0o444, 0o444),
                                   (0o666, 0o666), (0o400, 0o644)], ids=lambda modes: "-".join(f"{m:o}" for m in modes))
def test_nothing_is_wider_than_the_narrowest_shard(tmp_path, modes, umask):
    root = make_source(tmp_path / "hf", num_shards=2)
    for path, mode in zip(sorted(root.glob("*.safetensors")), modes):
        path.chmod(mode)
    (root / "tokenizer.json").write_text("{}")
    (root / "tokenizer.json").chmod(0o640)
    assert converted(root, tmp_path / "nt", umask) == 0
    wanted = (0o600 | modes[0] & modes[1] & 0o066) & ~umask
    for path in (tmp_path / "nt", *(tmp_path / "nt").rglob("*")):
        assert mode_of(path) == (folder_mode(wanted) & ~umask if path.is_dir() else
                                 wanted & 0o640 if path.name == "tokenizer.json" else wanted), path


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=str)
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o711, 0o755])
def test_an_empty_folder_that_is_replaced_is_not_opened(tmp_path, mode, flags):
    root = make_source(tmp_path / "hf")
    (tmp_path / "nt").mkdir()
    (tmp_path / "nt").chmod(mode)
    assert converted(root, tmp_path / "nt", 0o022, *flags) == 0
    for path in (tmp_path / "nt", *(tmp_path / "nt").rglob("*")):
        assert not mode_of(path) & 0o077 & ~mode and mode_of(path) & 0o600 == 0o600, path


@pytest.mark.parametrize("change", [lambda root: root.chmod(0o700), lambda root: (root / "model").chmod(0o750),
                                    lambda root: next(root.rglob("*.safetensors")).chmod(0o600)],
                         ids=["folder", "folder of weights", "file"])
def test_a_checkpoint_that_is_replaced_is_not_opened(tmp_path, change):
    root, destination = make_source(tmp_path / "hf"), tmp_path / "nt"
    assert converted(root, destination, 0o022) == 0
    change(destination)
    allowed = min(mode_of(path) for path in (destination, *destination.rglob("*")) if path.is_dir())
    readers = 0o077 & allowed & (0o700 if change.__code__.co_consts[-1] == 0o600 else 0o777)
    assert converted(root, destination, 0o022, "--tp", "1", "--overwrite") == 0
    for path in (destination, *destination.rglob("*")):
        if path.is_file():
            assert not mode_of(path) & 0o044 & ~readers, path
        assert not mode_of(path) & 0o077 & ~allowed, path


def test_the_plan_says_so(tmp_path, capsys):
    root = make_source(tmp_path / "hf")
    command = ["plan", str(root), str(tmp_path / "nt"), "--max-memory", "4GiB"]
    os.umask(before := os.umask(0o022))
    (root / "model.safetensors").chmod(0o644)
    assert main(command) == 0 and "shards are" not in capsys.readouterr().out
    (root / "model.safetensors").chmod(0o600)
    assert main(command) == 0
    said = "the shards are readable by their owner only (0600); so are the files of DST" in capsys.readouterr().out
    assert said == (before != 0o077)


def test_what_an_interrupted_run_left_is_closed_as_well(stopped):
    """Its files may be wider, where a person opened them, or the folder that is to be replaced was closed since."""
    for path in staging_of(stopped.destination).rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    assert stopped.run()[0] == 0 and stopped.tree() == stopped.wanted
    assert {mode_of(path) & 0o022 for path in stopped.destination.rglob("*")} == {0}


@needs_root
@pytest.mark.parametrize("flags", [(), ("--restart",)], ids=str)
@pytest.mark.parametrize("what", [".", "stream_reshard.journal", "model/model/decoder",
                                  "model/model/token_position_embeddings/pp_block/token_embedding"])
def test_what_another_user_has_prepared_is_not_taken_up(stopped, flags, what):
    path = staging_of(stopped.destination) / what
    os.chown(path, 65534, -1)
    code, err = stopped.run(flags=flags)
    assert code == 4 and "belongs to user 65534" in err and err.count("\n") == 1 and stopped.tree() is None
    os.chown(path, 0, -1)
    assert stopped.run(flags=flags)[0] == 0 and stopped.tree() == stopped.wanted


@needs_root
def test_a_lock_of_another_user_is_not_taken_over(shared):
    shared.clear()
    lock_of(shared.destination).touch()
    os.chown(lock_of(shared.destination), 65534, -1)
    code, err = shared.run()
    assert code == 4 and "belongs to user 65534" in err and lock_of(shared.destination).exists()
    lock_of(shared.destination).unlink()
    assert shared.run()[0] == 0


@needs_root
def test_where_a_server_gives_all_files_to_one_user_nothing_is_foreign(stopped, monkeypatch):
    """As NFS does with those of root."""
    for path in (staging_of(stopped.destination), *staging_of(stopped.destination).rglob("*")):
        os.chown(path, 65534, -1)
    os.chown(lock_of(stopped.destination), 65534, -1)

    def squashed(path, flags, mode=0o777, *, dir_fd=None, real=os.open):
        descriptor = real(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            os.chown(descriptor, 65534, -1)
        return descriptor

    monkeypatch.setattr(os, "open", squashed)
    assert stopped.run()[0] == 0 and stopped.tree() == stopped.wanted
