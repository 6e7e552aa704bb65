"""Small models whose every weight is random, and what forward passes over them make."""
import random

from stream_reshard.check.forward.side import open_side
from stream_reshard.machine.stop import Stop

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 251, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "shared_expert_intermediate_size": 40, "norm_topk_prob": False}

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}

FULL = {"sliding_window": None, "head_dim": 8}

PLAIN = {"llama": ("llama", {}), "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
         "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
         "qwen2": ("qwen2", {}),
         "tied qwen2": ("qwen2", {"tie_word_embeddings": True}), "mistral": ("mistral", FULL),
         "smollm3": ("smollm3", {"no_rope_layer_interval": 2}), "qwen2_moe": ("qwen2_moe", EXPERTS)}
"""(family, changes of the config) of models that Nanotron can hold."""

OTHERS = {"llama3": ("llama", {"rope_parameters": LLAMA3}),
          "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
          "biases": ("llama", {"attention_bias": True, "mlp_bias": True}), "head_dim": ("llama", {"head_dim": 16}),
          "window": ("mistral", FULL | {"sliding_window": 5}),
          "window of qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
          "normalised": ("qwen2_moe", EXPERTS | {"norm_topk_prob": True}),
          "some without experts": ("qwen2_moe", EXPERTS | {"mlp_only_layers": [1]}),
          "every second with experts": ("qwen2_moe", EXPERTS | {"decoder_sparse_step": 2}),
          "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}), "relu": ("llama", {"hidden_act": "relu"}), "gelu exact": ("llama", {"hidden_act": "gelu"})}
"""Models that it cannot hold, which are run all the same."""

TOKENS = [random.Random(place).randrange(SIZES["vocab_size"]) for place in range(24)]


def save_model(folder, family, changes):
    """Made by transformers, with random norms and biases too, in several shards; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from real.models import save_random
    config = AutoConfig.for_model(family, **SIZES | changes)
    return save_random(AutoModelForCausalLM.from_config(config), folder)


def told_by_transformers(folder):
    """(embedding, layer outputs, of which the last one is normed; logits) for TOKENS."""
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.tensor([TOKENS]), output_hidden_states=True)
    return [hidden[0] for hidden in out.hidden_states], out.logits[0]


def run(folder, tokens=TOKENS, vocab_size=SIZES["vocab_size"]):
    """(hidden states as above, logits of the true vocabulary) by this package, in bands of a few rows."""
    from stream_reshard.check.forward.steps import HIDDEN
    from stream_reshard.check.forward.weights import Bands, Weights
    side = open_side(folder, 2**20)
    model = side.model(Weights(folder, Bands(1000), Stop()))
    steps = [step for step in model.steps(tokens) if step.layer is None or step.name == HIDDEN]
    hidden = [step.value for step in steps]
    del hidden[-2]  # The last layer's output; transformers shows it normed.
    return hidden, model.logits(hidden[-1], 0, vocab_size)


def assert_close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()
