"""Ranks of check.py or train.py on this machine, forked from one process that has imported torch and Nanotron: that takes
longer than most of what the ranks do.

    python ranks.py 4 check.py WORDS

Each calls the script's main() with what torch.distributed.run would put into its environment. As there, the first rank
that fails ends the others, and the exit code is then 1.
"""
import importlib
import os
import signal
import socket
import sys
import traceback


def start(rank, main):
    """The pid of a rank."""
    if pid := os.fork():
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids):
    """Exit code of all together; who is left when one fails, or when this process is ended, ends too."""
    failed = False
    try:
        while pids and not failed:
            pid, status = os.wait()
            pids.remove(pid)
            failed = status != 0
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return int(failed)


def main():
    number, script, *words = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": number,
                       "LOCAL_WORLD_SIZE": number}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    module = importlib.import_module(script.removesuffix(".py"))
    sys.argv = [script, *words]
    return wait([start(rank, module.main) for rank in range(int(number))])


if __name__ == "__main__":
    sys.exit(main())
