"""What the peers share: their arguments, and which tensors of the source make which of the target."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TP, PP = 4, 2
INDEX_NAME = "model.safetensors.index.json"


def folders(description: str | None) -> tuple[Path, Path]:
    """(source, output) from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    return arguments.source, arguments.output


def weight_map(source: Path) -> dict[str, str]:
    """Name of the shard by name of the tensor, from the index."""
    return json.loads((source / INDEX_NAME).read_text())["weight_map"]


@dataclass(frozen=True)
class Target:
    """A tensor of a Llama as Nanotron keeps it."""

    name: str
    stage: int
    sources: tuple[str, ...]
    """Tensors that are split, then joined along dim 0 rank by rank."""
    dim: int | None
    """Which one tensor parallelism splits; None: one file for all ranks."""

    @property
    def num_ranks(self) -> int:
        """Files it has."""
        return 1 if self.dim is None else TP

    def path(self, output: Path, rank: int) -> Path:
        """The file of one rank."""
        return output / f"{self.stage}" / f"{self.name}_tp-rank-{rank}-of-{self.num_ranks}.safetensors"


_OF_LAYER = (("qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
             ("o_proj", ("self_attn.o_proj",), 1),
             ("gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), 0),
             ("down_proj", ("mlp.down_proj",), 1),
             ("input_layernorm", ("input_layernorm",), None),
             ("post_attention_layernorm", ("post_attention_layernorm",), None))


def targets(source: Path) -> Iterator[Target]:
    """All tensors of the target, stage by stage, layers spread evenly."""
    num_layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    yield Target("embedding", 0, ("model.embed_tokens.weight",), 0)
    for layer in range(num_layers):
        for name, sources, dim in _OF_LAYER:
            yield Target(f"{layer}.{name}", layer * PP // num_layers,
                         tuple(f"model.layers.{layer}.{part}.weight" for part in sources), dim)
    yield Target("final_layer_norm", PP - 1, ("model.norm.weight",), None)
    yield Target("lm_head", PP - 1, ("lm_head.weight",), 0)
