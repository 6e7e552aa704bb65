"""Qwen2: Llama with biases on the query, key and value projections, which only Nanotron's Qwen2Config has."""
from stream_reshard.model.architectures.base import Family
from stream_reshard.model.architectures.llama import (
    ATTENTION_IN, ATTENTION_NORM, ATTENTION_OUT, EMBEDDING, FINAL, MLP, MLP_NORM)
from stream_reshard.model.parameters import Row


def _bias_of(row: Row) -> Row:
    """The bias of a projection: one element per row of its matrix."""
    return Row(row.parameter + "_bias", row.dims.split(" | ")[0], row.split,
               row.hugging_face.replace(".weight", ".bias"), row.nanotron.replace(".weight", ".bias"))


ATTENTION = (ATTENTION_NORM, *ATTENTION_IN, *map(_bias_of, ATTENTION_IN), ATTENTION_OUT)

QWEN2 = Family(
    name="qwen2",
    hugging_face_class="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    settings={"use_sliding_window": False},
    nanotron_configs=("Qwen2Config",),
    rows=(EMBEDDING, *ATTENTION, MLP_NORM, *MLP, *FINAL),
)
