"""Asks the trainer of Nanotron's main about whole trainings, on the CPU, by way of an oracle that stands beside the checkout,
training_real.py: its modes `check`, `save` and `train`. Several questions share one start, parted by a plus sign:

    PYTHONPATH=NANOTRON/src:ORACLE python ranks.py 2 training.py check DST --reference SRC + train OUT --resume DST --steps 4

Rank 0 prints a line `RESULT {json}` per question, with what the oracle said on all ranks: the last stage knows the loss.
"""
import contextlib
import io
import json
import os
import sys
from itertools import groupby

import torch
import training_real

training_real.start_nanotron()  # once, before the ranks are forked
training_real.start_nanotron = lambda: None


def asked(words):
    """(exit code, lines) of one question."""
    sys.argv = ["training_real.py", *words]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            training_real.main()
        except SystemExit as end:
            return int(bool(end.code)), said.getvalue() + str(end.code)
    return 0, said.getvalue()


def main():
    failed = False
    for parted, words in groupby(sys.argv[1:], "+".__eq__):
        if not parted:
            answers = [None] * int(os.environ["WORLD_SIZE"])
            torch.distributed.all_gather_object(answers, asked(list(words)))
            ok = not any(code for code, _ in answers)
            failed |= not ok
            if os.environ["RANK"] == "0":
                print("\nRESULT " + json.dumps({"ok": ok, "text": "".join(text for _, text in answers)}), flush=True)
    return int(failed)
