"""Load all, fuse, chunk, save: what a converter does that was written without thinking of memory."""
from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.common import TP, folders, targets, weight_map


def main() -> None:
    """The whole model in memory, then the whole target beside it, then the files."""
    source, output = folders(__doc__)
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map(source).values())):
        state |= load_file(source / shard)
    made = {}
    for target in targets(source):
        if target.dim is None:
            made[target.path(output, 0)] = state[target.sources[0]]
            continue
        chunks = [state[name].chunk(TP, target.dim) for name in target.sources]
        for rank in range(TP):
            made[target.path(output, rank)] = torch.cat([chunk[rank] for chunk in chunks])
    for path, tensor in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"data": tensor}, path)


if __name__ == "__main__":
    main()
