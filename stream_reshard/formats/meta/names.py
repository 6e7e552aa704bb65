"""Names of the tensors, by the name of the parameter (`Transformer`, llama/model.py of meta-llama/llama)."""
from __future__ import annotations

from stream_reshard.model.names import Templates
from stream_reshard.model.parameters import Model

EMBEDDING_KEY, HEAD_KEY, FIRST_Q_KEY = "tok_embeddings.weight", "output.weight", "layers.0.attention.wq.weight"

_LAYER = "layers.{layer}."

NAMES = {
    "embedding": EMBEDDING_KEY,
    _LAYER + "attention_norm": _LAYER + "attention_norm.weight",
    _LAYER + "attention.q": _LAYER + "attention.wq.weight",
    _LAYER + "attention.k": _LAYER + "attention.wk.weight",
    _LAYER + "attention.v": _LAYER + "attention.wv.weight",
    _LAYER + "attention.o": _LAYER + "attention.wo.weight",
    _LAYER + "mlp_norm": _LAYER + "ffn_norm.weight",
    _LAYER + "mlp.gate": _LAYER + "feed_forward.w1.weight",
    _LAYER + "mlp.up": _LAYER + "feed_forward.w3.weight",
    _LAYER + "mlp.down": _LAYER + "feed_forward.w2.weight",
    "final_norm": "norm.weight",
    "lm_head": HEAD_KEY,
}

BUFFERS = frozenset({"rope.freqs"})
"""Tensors that follow from the settings."""


def templates_of(model: Model) -> Templates:
    """Finds the row and the instance of a tensor's name."""
    return Templates([NAMES[row.parameter] for row in model.rows], model.config.counts)


def key_of(model: Model, number: int) -> str:
    """Name of the tensors of a parameter."""
    row, instance = model.row_of(number)
    return NAMES[model.rows[row].parameter].format(layer=instance)
