"""Asks the importable Nanotron about checkpoints, on the CPU. Several steps share one start, parted by a plus sign:

    python ranks.py 4 check.py \\
        save HF OUT --tp 2 --pp 2 + load HF DST --tp 2 --pp 2 + load HF DST --tp 4 --logits FILE + config DST

    save    fill the model with the Hugging Face weights, save it with save_weights: what DST must look like
    load    load DST with load_weights; compare its model_config.json, and on all ranks each parameter bit for bit,
            with the Hugging Face model. --logits also compares float32 logits with those in FILE (pp 1 only),
            writes Nanotron's own beside it, as FILE.nanotron, and then makes one step of SGD over every token: rows of
            the embedding that it leaves as they are do not train
    config  read DST/config.yaml with Nanotron's own parser

dp is what remains of the processes. Rank 0 prints a line `RESULT {json}` per step. Exit code 0: all steps ok; 1: a step
has "ok": false, or an exception is on stderr.
"""
import argparse
import dataclasses
import json
import os
import sys
from itertools import groupby
from pathlib import Path

import nanotron_cpu  # first: puts the stand-ins in place  # isort: skip
import expected
import torch
from nanotron import constants
from nanotron.serialize import load_weights, metadata, save_weights
from safetensors.torch import load_file, save_file


def topology(args):
    dp = int(os.environ["WORLD_SIZE"]) // (args.tp * args.pp)
    return {"tp": args.tp, "pp": args.pp, "dp": dp}


def save(args):
    hf = expected.HuggingFace(args.hf)
    fields = expected.model_fields(hf, args.tp * args.vocab_multiple)
    config = nanotron_cpu.config_from_fields(args.model_config, fields)
    model, context = nanotron_cpu.build(config, **topology(args), dtype=hf.dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(expected.local(name, param, hf, nanotron_cpu.rope_interleaved(config)).nan_to_num())
    save_weights(model=model, parallel_context=context, root_folder=args.folder)
    return {"ok": True}


def load(args):
    hf = expected.HuggingFace(args.hf)
    config = nanotron_cpu.config_from_folder(args.folder)
    tp_of_folder = json.loads((args.folder / "checkpoint_metadata.json").read_text())["tp"]
    fields = expected.model_fields(hf, tp_of_folder * args.vocab_multiple)
    odd = {name: getattr(config, name) for name, value in fields.items() if getattr(config, name, value) != value}
    model, context = nanotron_cpu.build(config, **topology(args), dtype=torch.float32 if args.logits else hf.dtype)
    load_weights(model=model, parallel_context=context, root_folder=args.folder)
    meta = metadata.load_meta(parallel_context=context, root_folder=args.folder)
    wrong = [name for name, param in model.named_parameters() if not expected.same_bits(
        param, expected.local(name, param, hf, nanotron_cpu.rope_interleaved(config)))]
    ranks = nanotron_cpu.from_all_ranks((len(list(model.parameters())), wrong))
    result = {"class": type(config).__name__, "checkpoint_version": str(meta.version), "config_differs": odd,
              "parameters": sum(count for count, _ in ranks), "wrong": [names[:3] for _, names in ranks if names],
              "ok": not odd and not any(names for _, names in ranks)}
    if args.logits:
        result |= compare_logits(model, context, load_file(args.logits), f"{args.logits}.nanotron")
        rows = nanotron_cpu.from_all_ranks(nanotron_cpu.unmoved_rows(model, hf.config["vocab_size"]))
        result["unmoved_rows"] = sorted({row for rank in rows for row in rank})
    return result


def compare_logits(model, context, reference, path):
    want = reference["logits"]
    got = nanotron_cpu.logits(model, context, reference["input_ids"])[..., :want.shape[-1]]
    if int(os.environ["RANK"]) == 0:
        save_file({"input_ids": reference["input_ids"], "logits": got.contiguous()}, path)
    return {"max_difference": (got - want).abs().max().item(), "largest_logit": want.abs().max().item(),
            "same_argmax": (got.argmax(-1) == want.argmax(-1)).float().mean().item()}


def config(args):
    from nanotron.config import get_config_from_file
    parsed = get_config_from_file(str(args.folder / "config.yaml"))
    model = parsed.model.model_config
    parallelism = {axis: getattr(parsed.parallelism, axis) for axis in ("tp", "pp", "dp")}
    known = dataclasses.is_dataclass(model)  # release 0.4 keeps a dict when a key is unknown to it, and says nothing
    return {"ok": known, "class": type(model).__name__, "vocab_size": known and model.vocab_size,
            "init_method": type(parsed.model.init_method).__name__,
            "path": str(getattr(parsed.model.init_method, "path", "")),
            "dtype": str(parsed.model.dtype), "vocab_multiple": parsed.model.make_vocab_size_divisible_by} | parallelism


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    steps = parser.add_subparsers(required=True)
    for step in (save, load, config):
        command = steps.add_parser(step.__name__)
        command.set_defaults(step=step)
        if step is not config:
            command.add_argument("hf", type=Path)
            command.add_argument("--tp", type=int, default=1)
            command.add_argument("--pp", type=int, default=1)
            command.add_argument("--vocab-multiple", type=int, default=1)
        command.add_argument("folder", type=Path)
    steps.choices["save"].add_argument("--model-config", default="LlamaConfig")
    steps.choices["load"].add_argument("--logits", type=Path)
    return parser.parse_args(words)


def main():
    torch.set_num_threads(1)
    commands = [parse(words) for parted, words in groupby(sys.argv[1:], "+".__eq__) if not parted]
    failed = False
    for args in commands:
        result = {"step": args.step.__name__, "nanotron_format": str(constants.CHECKPOINT_VERSION),
                  "folder": str(args.folder)} | args.step(args)
        failed |= not result["ok"]
        nanotron_cpu.tell(result)
    return 1 if failed else 0
