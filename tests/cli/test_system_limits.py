"""Limits of the system on threads, memory and files: one line that says which, and then the same command goes on."""
import os
import resource

import pytest
from shells import as_nobody, shelled
from sources import make_source

from stream_reshard.cli import main


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own has no other threads")
@pytest.mark.parametrize("number", [1, 4, 8])
def test_threads_that_are_refused(open_to_all, number):
    """One line, and the same command goes on."""
    source, copy = make_source(open_to_all / "hf"), open_to_all / "nt"
    code, err = as_nobody(source, copy, limits={resource.RLIMIT_NPROC: number})
    if code:
        assert code == 6 and err.startswith("error: the system refuses another thread") and "to go on: " in err, err
        assert as_nobody(source, copy) == (0, "")
    assert main(["verify", str(source), str(copy), "--quiet"]) == 0
    if number == 1:
        code, err = as_nobody("verify", source, copy, "--workers", 4, limits={resource.RLIMIT_NPROC: 1})
        assert code == 6 and err.startswith("error: the system refuses another thread") and err.count("\n") == 1


@pytest.mark.parametrize("mib", [60, 120, 180])
def test_memory_that_is_refused(tmp_path, mib):
    """ulimit -v: also where numpy's library would end the process by itself."""
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    code, _, err = shelled(f"ulimit -v {mib * 1024}; |>", source, copy, "--quiet")
    if code:
        assert code == 6 and err.startswith("error: the system refuses ") and err.count("\n") <= 2, err
    assert shelled("", source, copy, "--quiet")[0] == 0 and main(["verify", str(source), str(copy), "--quiet"]) == 0


@pytest.mark.parametrize("number", [6, 15, 33])
def test_files_that_cannot_be_opened_are_known_beforehand(tmp_path, number):
    """ulimit -n: nothing is begun that could not be finished, and with a few more the run needs no more."""
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    code, _, err = shelled(f"ulimit -n {number}; |>", source, copy, "--tp", 2, "--quiet")
    if code:
        assert code == 6 and "ulimit -n" in err and err.count("\n") == 1 and sorted(os.listdir(tmp_path)) == ["hf"], err
    else:
        assert main(["verify", str(source), str(copy), "--quiet"]) == 0
    assert code == 0 or number < 33
