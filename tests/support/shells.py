"""The command started as its users start it: from a shell that limits it, with streams of all kinds, by others than
root."""
import os
import resource
import subprocess
import sys
import traceback

from running import ROOT

from stream_reshard.cli import main


def code_of(words):
    """What the command ends with; argparse raises SystemExit."""
    try:
        return main([*map(str, words)])
    except SystemExit as stop:
        return stop.code


def started(*words, **how):
    return subprocess.run([sys.executable, "-m", "stream_reshard", *map(str, words)], cwd=ROOT, text=True, **how)


def shelled(text, *words, cwd=ROOT, env={}):
    """(exit code, stdout, stderr) of the command in a shell that puts `text` behind it; what a limit needs goes before."""
    before, _, behind = text.rpartition("|>")
    command = f'{before} {"" if before.strip().endswith("exec") else "exec"} "$@" {behind}'
    run = subprocess.run(["bash", "-c", command, "bash", sys.executable, "-m", "stream_reshard", *map(str, words)],
                         cwd=cwd, capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT), **env), timeout=60)
    return run.returncode, run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")


def as_nobody(*words, limits={}):
    """(exit code, stderr) of the command in a fork that has given up the rights of root."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        sys.stderr = open(writing, "w")
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65533)
            os.setuid(65533)
        for number, limit in limits.items():
            resource.setrlimit(number, (limit, limit))
        try:
            code = code_of([*map(str, words), "--quiet"])
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with open(reading) as stream:
        err = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), err
