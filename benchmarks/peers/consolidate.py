"""torch's Distributed Checkpoint: consolidate_safetensors_files, from one file per TP rank to shards (the inverse job).

`prepare` makes its input, outside the timed part: a file per rank with the sharding in its metadata, as
HuggingFaceStorageWriter(save_distributed=True) leaves it (torch/distributed/checkpoint/_hf_utils.py, hf_storage.py).
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from benchmarks.peers.common import INDEX_NAME, TP, Target, targets, weight_map
from benchmarks.peers.get_slice import part


def prepare(source: Path, sharded: Path) -> None:
    """One file per rank with its part of every tensor; the parameters that are not split go to rank 0."""
    sharded.mkdir()
    shutil.copy(source / INDEX_NAME, sharded)
    where = weight_map(source)
    split = {name: target for target in targets(source) for name in target.sources}
    for rank in range(TP):
        tensors, offsets = {}, {}
        for name, target in split.items():
            if rank < target.num_ranks:
                with safe_open(source / where[name], "pt") as shard:
                    tensors[name] = part(shard.get_slice(name), target, rank).contiguous()
                offsets[name] = {"saved_offsets": _offsets(tensors[name].shape, target, rank)}
        save_file(tensors, sharded / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors",
                  {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})


def _offsets(shape: tuple[int, ...], target: Target, rank: int) -> list[int]:
    """Where a rank's part begins in the whole tensor, per dim."""
    return [rank * size if dim == target.dim else 0 for dim, size in enumerate(shape)]


def consolidate(sharded: Path, output: Path) -> None:
    """The timed part: as many shards as the source has, a thread for each core."""
    where = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
    number = {shard: i + 1 for i, shard in enumerate(sorted(set(where.values())))}
    output.mkdir()
    consolidate_safetensors_files(str(sharded), str(output), {name: number[shard] for name, shard in where.items()},
                                  num_threads=os.cpu_count() or 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prepare", action="store_true", help="make the input, at OUTPUT")
    arguments = parser.parse_args()
    (prepare if arguments.prepare else consolidate)(arguments.source, arguments.output)
