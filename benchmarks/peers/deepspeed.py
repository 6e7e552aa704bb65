"""DeepSpeed's ds_to_universal: a ZeRO-1 checkpoint at TP=2 DP=2 to one that loads at any topology.

`prepare` makes its input, outside the timed part: as many parameters as the given training has, unfused as in Hugging
Face's Llama, in the files that DeepSpeed saves (deepspeed/runtime/engine.py, runtime/zero/stage_1_and_2.py).
"""
from __future__ import annotations

import argparse
import json
import sys
import zlib
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.tensor_fragment import fragment_address

TP, DP = 2, 2
KINDS = ("exp_avg", "exp_avg_sq", "fp32")
_ROWS, _REPLICATED = r".*\.(o_proj|down_proj)\.weight", r".*norm\.weight"
_INFO = {"universal_checkpoint_version": 0.4, "parameter_with_row_parallelism_patterns": [_ROWS],
         "tp_replicated_parameter_patterns": [_REPLICATED]}
Shape = tuple[int, ...]


def shapes_of(config: dict[str, Any]) -> dict[str, Shape]:
    """Shape by name of every parameter of a Llama."""
    hidden, ffn, vocab = (config[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    of_layer: dict[str, Shape] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
            **{f"model.layers.{layer}.{name}.weight": shape for layer in range(config["num_hidden_layers"])
               for name, shape in of_layer.items()}}


def whole(name: str, shape: Shape) -> dict[str, torch.Tensor]:
    """The states of a parameter by kind, the same at each call."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return dict(zip(KINDS, torch.rand(len(KINDS), *shape, generator=generator)))


def shard(name: str, tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """The part of one TP rank."""
    if tensor.dim() == 1:
        return tensor
    return tensor.chunk(TP, 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0)[tp]


def prepare(training: Path, output: Path) -> None:
    """A file of weights per TP rank, one of states per TP and DP rank: a stretch of all parameters, flattened."""
    output.mkdir()
    shapes = shapes_of(json.loads((training / "model_config.json").read_text()))
    for tp in range(TP):
        shards = {name: {kind: shard(name, state, tp) for kind, state in whole(name, shape).items()}
                  for name, shape in shapes.items()}
        weights = {name: states["fp32"].bfloat16() for name, states in shards.items()}
        torch.save({"module": weights, "param_shapes": [{name: weight.shape for name, weight in weights.items()}],
                    "universal_checkpoint_info": _INFO, "iteration": 10, "ds_config": {},
                    "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": TP}},
                   output / f"mp_rank_{tp:02}_model_states.pt")
        flat = {kind: torch.cat([states[kind].flatten() for states in shards.values()]) for kind in KINDS}
        sizes = {name: weight.numel() for name, weight in weights.items()}
        for dp in range(DP):
            _save_states(output / f"bf16_zero_pp_rank_{dp}_mp_rank_{tp:02}_optim_states.pt",
                         {kind: states.chunk(DP)[dp].clone() for kind, states in flat.items()}, sizes, dp)


def _save_states(path: Path, flat: dict[str, torch.Tensor], sizes: dict[str, int], dp: int) -> None:
    """The stretch of one DP rank, and which of its elements are of which parameter."""
    begin = dp * -(-sum(sizes.values()) // DP)
    end, fragments = begin + flat["fp32"].numel(), {}
    for (name, size), stop in zip(sizes.items(), accumulate(sizes.values())):
        first, last = max(stop - size, begin), min(stop, end)
        if first < last:
            fragments[name] = fragment_address(numel=last - first, start=first - begin)
    state = {"step": torch.tensor(10.0), "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}
    torch.save({"ds_config": {}, "optimizer_state_dict": {
        "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 3e-4, "params": [0]}]},
        "single_partition_of_fp32_groups": [flat["fp32"]], "zero_stage": 1, "group_paddings": [0],
        "partition_count": [DP], "param_slice_mappings": [fragments]}}, path)


def convert(checkpoint: Path, output: Path) -> None:
    """The timed part: the tool itself, with its own defaults."""
    sys.argv[1:] = ["--input_folder", str(checkpoint), "--output_folder", str(output)]
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prepare", action="store_true", help="make the input, at OUTPUT")
    arguments = parser.parse_args()
    (prepare if arguments.prepare else convert)(arguments.source, arguments.output)
