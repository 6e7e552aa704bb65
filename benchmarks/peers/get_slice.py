"""safe_open().get_slice for every output, joined, saved: the careful way with Hugging Face's own library."""
from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.peers.common import Target, folders, targets, weight_map


def part(view: Any, target: Target, rank: int) -> torch.Tensor:
    """What one rank has of one source tensor."""
    if target.dim is None:
        return view[:]
    size = view.get_shape()[target.dim] // target.num_ranks
    rows = slice(rank * size, (rank + 1) * size)
    return view[rows] if target.dim == 0 else view[:, rows]


def main() -> None:
    """One output in memory at a time."""
    source, output = folders(__doc__)
    where = weight_map(source)
    with ExitStack() as stack:
        shards = {name: stack.enter_context(safe_open(source / name, "pt")) for name in set(where.values())}
        for target in targets(source):
            views = [shards[where[name]].get_slice(name) for name in target.sources]
            for rank in range(target.num_ranks):
                path = target.path(output, rank)
                path.parent.mkdir(parents=True, exist_ok=True)
                parts = [part(view, target, rank) for view in views]
                save_file({"data": torch.cat(parts).contiguous()}, path)


if __name__ == "__main__":
    main()
