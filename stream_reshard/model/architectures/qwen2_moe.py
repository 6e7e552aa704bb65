"""Qwen2-MoE: Qwen2 with experts, a router and a shared expert in place of the MLP (nanotron/nn/moe.py). EP=1 only."""
from stream_reshard.model.architectures.base import Family
from stream_reshard.model.architectures.llama import EMBEDDING, FINAL, MLP_NORM
from stream_reshard.model.architectures.qwen2 import ATTENTION
from stream_reshard.model.parameters import Row

_MLP = "layers.{layer}.mlp."
_HF = "model.layers.{layer}.mlp."
_NT = "decoder.{layer}.pp_block.mlp."

ROUTER = Row(_MLP + "router", "experts | hidden", None, _HF + "gate.weight", _NT + "router.weight", is_float32=True)
EXPERTS = (
    Row(_MLP + "experts.{expert}.gate", "expert_ffn | hidden", None, _HF + "experts.{expert}.gate_proj.weight",
        _NT + "experts.merged_gate_up_proj", is_stacked=True),
    Row(_MLP + "experts.{expert}.up", "expert_ffn | hidden", None, _HF + "experts.{expert}.up_proj.weight",
        _NT + "experts.merged_gate_up_proj", is_stacked=True),
    Row(_MLP + "experts.{expert}.down", "hidden | expert_ffn", None, _HF + "experts.{expert}.down_proj.weight",
        _NT + "experts.merged_down_proj", is_stacked=True),
)
SHARED_EXPERT = (
    Row(_MLP + "shared.gate", "shared_ffn | hidden", "shared_ffn", _HF + "shared_expert.gate_proj.weight",
        _NT + "shared_expert.gate_up_proj.weight"),
    Row(_MLP + "shared.up", "shared_ffn | hidden", "shared_ffn", _HF + "shared_expert.up_proj.weight",
        _NT + "shared_expert.gate_up_proj.weight"),
    Row(_MLP + "shared.down", "hidden | shared_ffn", "shared_ffn", _HF + "shared_expert.down_proj.weight",
        _NT + "shared_expert.down_proj.weight"),
    Row(_MLP + "shared_gate", "one | hidden", None, _HF + "shared_expert_gate.weight",
        _NT + "shared_expert_gate.weight"),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    hugging_face_class="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768, "num_experts": 60, "num_experts_per_tok": 4,
              "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "router_aux_loss_coef": 0.001},
    settings={"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    nanotron_configs=("Qwen2Config",),
    rows=(EMBEDDING, *ATTENTION, MLP_NORM, ROUTER, *EXPERTS, *SHARED_EXPERT, *FINAL),
)
