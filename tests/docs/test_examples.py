"""The examples run as they are."""
import re
import subprocess
import sys

from documents import ROOT, prepare

from stream_reshard.cli.demo import CONFIG, write_random_source

SLURM = ROOT / "examples" / "convert.slurm"

SBATCH = {"--job-name", "--nodes", "--ntasks", "--cpus-per-task", "--mem", "--time", "--signal", "--requeue",
          "--open-mode", "--output"}
"""Flags of sbatch(1) that the script takes."""


def test_the_script_for_python_runs(tmp_path):
    """Twice: on the second time everything is there."""
    env = prepare(tmp_path)
    for _ in range(2):
        ran = subprocess.run([sys.executable, ROOT / "examples" / "convert.py", "out"], cwd=tmp_path, env=env,
                             capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "UsageError tp=3 " in ran.stdout and ran.stdout.count("all equal") == 2, ran.stdout


def slurm(room, env, **more):
    """The script as sbatch runs it, in a job."""
    env = env | {"SRC": str(room / "hf"), "DST": str(room / "nt"), "TP": "2", "PP": "2", "SLURM_JOB_ID": "17"} | more
    return subprocess.run(["bash", SLURM], cwd=room, env=env, capture_output=True, text=True)


def test_the_script_for_slurm_stops_and_goes_on(tmp_path):
    """A signal before the limit on time: the job is queued again, and its second run keeps what is done."""
    env = prepare(tmp_path)
    write_random_source(tmp_path / "hf", CONFIG | {"num_hidden_layers": 24})
    first = slurm(tmp_path, env, STOP_AT=str(tmp_path / "nt.partial"))
    assert first.returncode == 138, first.stderr
    assert (tmp_path / "requeued").read_text() == "17" and not (tmp_path / "nt").exists()
    (tmp_path / "requeued").unlink()
    second = slurm(tmp_path, env, STOP_AT="/", SLURM_RESTART_COUNT="1")
    assert second.returncode == 0, second.stderr
    assert "all equal" in second.stdout and not (tmp_path / "requeued").exists()


def test_refusals_are_left_to_a_person(tmp_path):
    ran = slurm(tmp_path, prepare(tmp_path))
    assert ran.returncode == 3 and not (tmp_path / "requeued").exists() and "is not a folder" in ran.stderr


def test_lines_for_sbatch_are_before_all_commands():
    lines = SLURM.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    given = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(line in lines[:first_command] for line in given)
    assert {re.match(r"#SBATCH (--[a-z-]+)(=\S+)?$", line)[1] for line in given} == SBATCH
