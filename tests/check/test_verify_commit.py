"""What `--verify` refuses at the end of a conversion never becomes DST; what it lets through is right."""
import pytest
from damage import every, poke
from running import call
from trees import MANIFEST, NORM

from stream_reshard.check import weights as package
from stream_reshard.errors import ResourceError
from stream_reshard.run import writing as execute

DAMAGES = [
    ("a weight", lambda c: poke(every(c, "o_proj")[0], -1), "o_proj"),
    ("a missing file", lambda c: every(c, NORM)[0].unlink(), NORM),
    ("a companion", lambda c: poke(c / "tokenizer.json", 0), "tokenizer.json"),
    ("an extra file", lambda c: (c / "x").touch(), "'x' is extra"),
    ("the manifest", lambda c: poke(c / MANIFEST, 99), MANIFEST)]


@pytest.mark.parametrize("damage, word", [pytest.param(*row[1:], id=row[0]) for row in DAMAGES])
def test_what_the_check_of_a_conversion_refuses_never_becomes_dst(made, tmp_path, capsys, monkeypatch, damage, word):
    source, destination, real = made("hf"), tmp_path / "nt", package.verify
    flags = ["--tp", "2", "--quiet", "--verify"]

    def damaged(original, copy, *rest):
        assert not destination.exists() and (copy / "model_config.json").exists()
        damage(copy)
        return real(original, copy, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(package, "verify", damaged)
        assert call(source, destination, *flags) == 5
    err = capsys.readouterr().err
    assert word in err and "was not committed" in err and "--restart" in err and not destination.exists()
    assert call(source, destination, *flags) == 4 and "--restart" in capsys.readouterr().err
    assert not destination.exists()
    if word == "'x' is extra":
        assert call(source, destination, *flags, "--restart") == 4 and "holds 'x'" in capsys.readouterr().err
        (tmp_path / "nt.partial" / "x").unlink()
    assert call(source, destination, *flags, "--restart") == 0
    assert call("verify", source, destination) == 0


@pytest.mark.parametrize("place, name", [(execute, "check_identities"), (package, "verify")],
                         ids=["before", "in the check"])
def test_a_stop_shortly_before_the_commit(made, tmp_path, capsys, monkeypatch, differs, place, name):
    """What is there then is all but the name, and still no checkpoint; the next run makes it one."""
    def failing(*arguments):
        raise ResourceError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        assert call(made("hf"), tmp_path / "nt", "--quiet", "--verify") == 6
    capsys.readouterr()
    assert not (tmp_path / "nt").exists()
    differs(made("hf"), tmp_path / "nt.partial", [])
    assert call(made("hf"), tmp_path / "nt", "--quiet", "--verify") == 0


def test_a_stop_in_the_check_before_a_swap_is_not_one_in_the_swap(made, tmp_path, capsys, monkeypatch, verify):
    """The damaged checkpoint that was to be replaced must not be taken for the one that has replaced another."""
    source, root = made("hf"), tmp_path / "nt"
    assert call(source, root, "--quiet") == 0
    poke(every(root, "o_proj")[0], -1)

    def failing(*arguments):
        raise ResourceError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(package, "verify", failing)
        assert call(source, root, "--quiet", "--overwrite", "--verify") == 6
    capsys.readouterr()
    assert call(source, root, "--quiet", "--overwrite", "--verify") == 0
    assert verify(source, root)[0] == 0


@pytest.mark.parametrize("flags", [(), ("--tp", "2", "--pp", "2"), ("--rope", "interleaved", "--dtype", "float32")],
                         ids=str)
def test_a_conversion_with_a_check_ends_well(made, tmp_path, capsys, flags):
    assert call(made("qwen2_hf"), tmp_path / "nt", "--verify", *flags) == 0
    assert "verified every weight" in capsys.readouterr().out
