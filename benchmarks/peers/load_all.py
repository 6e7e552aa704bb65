"""Load all, join, cut, save: a training moved with torch alone, as its owner would write it without thinking of memory.

For a Llama with ZeRO-1; the target is TP=4 PP=2 without ZeRO. Every weight, moment, master and step goes along. The
schedule and the documents, some kilobytes, are left to the owner.
"""
from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.common import PP, TP, folders

MOMENTS, MASTERS, WEIGHT = ("exp_avg", "exp_avg_sq"), "gradient_accumulator", "weight"
Pieces = list[torch.Tensor]
"""What is fused in one parameter."""


def rank_of(path: Path, axis: str) -> int:
    """Coordinate of a file on a parallel axis, from its name."""
    found = re.search(rf"{axis}(?:-rank)?-(\d+)-of", path.name)
    return int(found[1]) if found else 0


def split_dim(name: str) -> int | None:
    """The dim that tensor parallelism splits."""
    return None if "norm" in name else 1 if "o_proj" in name or "down_proj" in name else 0


def pieces(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> Sequence[torch.Tensor]:
    """A tensor, or what is fused in it."""
    if "qkv_proj" in name:
        q, kv = config["num_attention_heads"], config["num_key_value_heads"]
        size = len(tensor) // (q + 2 * kv)
        return tensor.split([q * size, kv * size, kv * size])
    return tensor.chunk(2) if "gate_up_proj" in name else [tensor]


def join(name: str, shards: Pieces, config: dict[str, Any]) -> Pieces:
    """The whole parameter from the shards of all TP ranks."""
    dim = split_dim(name)
    if dim is None:
        return shards[:1]
    return [torch.cat(parts, dim) for parts in zip(*(pieces(name, shard, config) for shard in shards))]


def cut(name: str, whole: Pieces, tp: int) -> torch.Tensor:
    """The shard of one TP rank of the target."""
    dim = split_dim(name)
    return whole[0] if dim is None else torch.cat([piece.chunk(TP, dim)[tp] for piece in whole])


def load_weights(source: Path) -> dict[tuple[str, str], Pieces]:
    """The shards of each weight, by (name, kind)."""
    shards = defaultdict(list)
    for path in sorted((source / "model").rglob("*.safetensors"), key=lambda path: rank_of(path, "tp")):
        name = ".".join([*path.parent.relative_to(source / "model").parts, "weight"])
        shards[name, WEIGHT] += load_file(path).values()
    return shards


def load_states(source: Path) -> tuple[dict[tuple[str, str], Pieces], dict[str, tuple[Any, Any]]]:
    """The shards of each moment and master, by (name, kind); (step, settings) by name."""
    shapes = json.loads((source / "optimizer" / "optimizer_config.json").read_text())["configs"]["orig_param_shapes"]
    by_tp: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for path in sorted((source / "optimizer").glob("*.pt"), key=lambda path: rank_of(path, "dp")):
        by_tp[rank_of(path, "tp"), rank_of(path, "pp")].append(torch.load(path))
    shards, settings = defaultdict(list), {}
    for rank in sorted(by_tp):
        files = by_tp.pop(rank)
        for number, name in files[0]["names"].items():
            shape = list(map(int, shapes.get(name, [-1])))
            for kind in MOMENTS:
                flat = torch.cat([file["state"][number].pop(kind) for file in files])
                shards[name, kind].append(flat.view(shape))
            flat = torch.cat([file[MASTERS].pop(name) for file in files])
            shards[name, MASTERS].append(flat.view(shape))
            settings[name] = files[0]["state"][number]["step"], files[0]["param_groups"][number]
    return shards, settings


def stages(names: Iterable[str], num_layers: int) -> Iterator[tuple[int, str]]:
    """(stage, name) of every parameter, layers spread evenly."""
    for name in names:
        layer = re.search(r"decoder\.(\d+)\.", name)
        yield int(layer[1]) * PP // num_layers if layer else 0 if "embedding" in name else PP - 1, name


def main() -> None:
    """Everything in memory, then one rank's file after the other."""
    source, output = folders(__doc__)
    config = json.loads((source / "model_config.json").read_text())
    shards, settings = load_states(source)
    shards |= load_weights(source)
    wholes = {key: join(key[0], shards.pop(key), config) for key in list(shards)}
    for tp in range(TP):
        for pp in range(PP):
            own = [name for stage, name in stages(settings, config["num_hidden_layers"]) if stage == pp]
            made = {(name, kind): cut(name, wholes[name, kind], tp) for name in own
                    for kind in (*MOMENTS, MASTERS, WEIGHT)}
            for name in own:
                folder = output / "model" / Path(*name.split(".")[:-1])
                folder.mkdir(parents=True, exist_ok=True)
                ranks = "" if split_dim(name) is None else f"_pp-rank-{pp}-of-{PP}_tp-rank-{tp}-of-{TP}"
                save_file({"data": made[name, WEIGHT]}, folder / f"model_weight{ranks}.safetensors")
            (output / "optimizer").mkdir(exist_ok=True)
            torch.save({
                "state": {number: {"step": settings[name][0]} | {kind: made[name, kind] for kind in MOMENTS}
                          for number, name in enumerate(own)},
                "param_groups": [settings[name][1] | {"params": [number]} for number, name in enumerate(own)],
                "names": dict(enumerate(own)), MASTERS: {name: made[name, MASTERS] for name in own},
            }, output / "optimizer" / f"optimizer_pp-{pp}-of-{PP}_tp-{tp}-of-{TP}_exp-0-of-1.pt")


if __name__ == "__main__":
    main()
