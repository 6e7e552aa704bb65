"""Whole trainings as release 0.4 of Nanotron saves them, on the CPU. Several topologies share one start, parted by a plus sign:

    python ranks.py 4 states.py WEIGHTS OUT --tp 2 --zero 1 + WEIGHTS OTHER --pp 4

Each makes two steps of its optimizer and schedule, with gradients that are set by hand, and saves them to OUT with the
weights of the converted folder WEIGHTS. dp is what remains of the processes. Rank 0 prints a line `RESULT {json}` for each.
"""
import argparse
import dataclasses
import json
import os
import sys
from itertools import groupby
from pathlib import Path

import nanotron_cpu  # first: puts the stand-ins in place  # isort: skip
import nanotron.serialize
import torch
from nanotron import distributed
from nanotron.config import get_config_from_file
from nanotron.helpers import init_optimizer_and_grad_accumulator, lr_scheduler_builder

STEPS, BATCH = 2, 4


def settings(args):
    """config.yaml of WEIGHTS, for this topology and a CPU."""
    config = get_config_from_file(str(args.weights / "config.yaml"))
    config.parallelism.tp, config.parallelism.pp = args.tp, args.pp
    config.parallelism.dp = int(os.environ["WORLD_SIZE"]) // (args.tp * args.pp)
    config.tokens.batch_accumulation_per_replica = BATCH // config.parallelism.dp
    config.optimizer.zero_stage, config.optimizer.torch_adam_is_fused = args.zero, False
    return config


def step(model, optimizer, accumulator, schedule):
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with accumulator.no_sync():
        for name, element in accumulator.fp32_grad_buffers.items():
            accumulator._accumulate_grad(name=name, half_param=element["half"])
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def save(args):
    config, model_config = settings(args), nanotron_cpu.config_from_folder(args.weights)
    sizes = config.parallelism
    model, context = nanotron_cpu.build(model_config, sizes.tp, sizes.pp, sizes.dp, torch.bfloat16)
    nanotron.serialize.load_weights(model=model, parallel_context=context, root_folder=args.weights)
    optimizer, accumulator = init_optimizer_and_grad_accumulator(model, config.optimizer, context)
    optimizer._all_gather_params = lambda: None  # gloo gathers equal sizes only
    schedule = lr_scheduler_builder(optimizer, config.optimizer.learning_rate_scheduler, 100)
    for _ in range(STEPS):
        step(model, optimizer, accumulator, schedule)
    nanotron.serialize.load_weights(model=model, parallel_context=context, root_folder=args.weights)
    is_first = int(os.environ["RANK"]) == 0
    args.folder.mkdir(exist_ok=True)
    nanotron.serialize.save(
        config=config, model=model, optimizer=optimizer, lr_scheduler=schedule, parallel_context=context,
        root_folder=args.folder, should_save_config=is_first,
        should_save_model=distributed.get_rank(context.dp_pg) == 0, sanity_checks=False,
        checkpoint_metadata={"last_train_step": STEPS, "consumed_train_samples": STEPS * BATCH})
    if is_first:
        (args.folder / "model_config.json").write_text(json.dumps(dataclasses.asdict(model_config)))
    return {"ok": True}


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for folder in ("weights", "folder"):
        parser.add_argument(folder, type=Path)
    for axis, least in (("--tp", 1), ("--pp", 1), ("--zero", 0)):
        parser.add_argument(axis, type=int, default=least)
    return parser.parse_args(words)


def main():
    torch.set_num_threads(1)
    for parted, words in groupby(sys.argv[1:], "+".__eq__):
        if not parted:
            nanotron_cpu.tell(save(parse(list(words))))
    return 0
