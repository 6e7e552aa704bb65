"""Continues pretraining with Nanotron's own run_train.py, on the CPU, from the config.yaml of a converted folder.

    NANOTRON_REPO=... python ranks.py 2 train.py HF DST

DST/config.yaml is taken as it stands, and only what a CPU and a short run need is changed: float32, no fused Adam, pp 1
(gloo hangs in Nanotron's pipeline engine; the loader takes the weights of any pp), a short sequence, few steps.
The learning rate is so small that afterwards every parameter must still be the Hugging Face one, but for a little: so
the training did start from these weights. Rank 0 prints a line `RESULT {json}`; exit code 1 when that does not hold.
"""
import argparse
import math
import os
import runpy
import sys
import tempfile
from pathlib import Path

import nanotron_cpu  # first: puts the stand-ins in place  # isort: skip
import expected
import torch
import yaml
from nanotron.logging.timers import TimerType
from nanotron.trainer import DistributedTrainer

LEARNING_RATE = 1e-6
ALLOWED_CHANGE = 100 * LEARNING_RATE


class CpuGenerator(torch.Generator):
    """Nanotron's dummy data asks for a generator on "cuda"."""

    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")


def for_a_cpu(config, steps, folder):
    """The document of config.yaml with what a CPU and a short run need changed."""
    ranks, tp = int(os.environ["WORLD_SIZE"]), config["parallelism"]["tp"]
    config["model"]["dtype"] = "float32"
    config["parallelism"].update(pp=1, dp=ranks // tp)
    config["optimizer"].update(accumulate_grad_in_fp32=False)
    config["optimizer"]["optimizer_factory"].update(torch_adam_is_fused=False)
    config["optimizer"]["learning_rate_scheduler"].update(
        learning_rate=LEARNING_RATE, min_decay_lr=LEARNING_RATE / 10, lr_warmup_steps=1, lr_decay_steps=steps)
    config["tokens"].update(sequence_length=32, train_steps=steps)
    config["checkpoints"].update(checkpoints_path=folder, save_final_state=False)
    return config


def record_losses():
    """Keeps what the trainer logs as the loss of each step."""
    losses, log = [], DistributedTrainer.train_step_logs

    def keep(self, **step):
        losses.append(float(step["loss_avg"]))
        return log(self, **step)

    DistributedTrainer.train_step_logs = keep
    return losses


def largest_change(trainer, hf):
    """How far the farthest parameter of this rank is from the Hugging Face weights; vocabulary padding is left out."""
    rope_interleaved = nanotron_cpu.rope_interleaved(trainer.model_config)
    changes = (param - expected.local(name.removeprefix("module."), param, hf, rope_interleaved)
               for name, param in trainer.model.named_parameters())
    return max(change.abs().nan_to_num().max().item() for change in changes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("hf", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.Generator, torch.cuda.device_count = CpuGenerator, lambda: 1
    TimerType._value2member_map_["cuda"] = TimerType.CPU  # a timer that fell back to the CPU is refused the next time
    torch.set_num_threads(1)
    losses = record_losses()
    with tempfile.TemporaryDirectory() as folder:
        config = for_a_cpu(yaml.safe_load((args.converted / "config.yaml").read_text()), args.steps, folder)
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config))
        sys.argv = ["run_train.py", "--config-file", str(path)]
        ran = runpy.run_path(str(Path(os.environ["NANOTRON_REPO"], "run_train.py")), run_name="__main__")
    change = max(nanotron_cpu.from_all_ranks(largest_change(ran["trainer"], expected.HuggingFace(args.hf))))
    ok = len(losses) == args.steps and all(map(math.isfinite, losses)) and 0 < change < ALLOWED_CHANGE
    nanotron_cpu.tell({"step": "train", "losses": losses, "largest_change": change, "ok": ok})
    return 0 if ok else 1
