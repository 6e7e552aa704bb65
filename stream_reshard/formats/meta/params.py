"""params.json, as the config.json that transformers' convert_llama_weights_to_hf.py writes for the model.

The keys are those of `ModelArgs` (llama/model.py of meta-llama/llama; models/llama3/args.py of llama-models). They
leave out the context length and the token ids, which are those of the release. Which release it is, the script is told;
here it follows from the vocabulary, the base of RoPE and, as in llama.cpp, from norm_eps.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stream_reshard.errors import Cause, quoted
from stream_reshard.formats.config_json import SourceConfig, parse_config
from stream_reshard.formats.config_reader import ConfigReader
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.small_files import read_json_with_notes
from stream_reshard.storage.stand_ins import answer

PARAMS_NAME = "params.json"

_UNDERSTOOD = frozenset("""
    dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope
    sliding_window""".split())

_WITHOUT_EFFECT = frozenset({"max_batch_size", "max_seq_len"})
"""Keys that concern the cache of Meta's own code."""

_ROPE_THETA = 10000.0
"""Base of RoPE where the file gives none, as in Llama 1 and 2."""


class _Release(NamedTuple):
    """What the script knows of a release of Llama."""

    name: str
    max_position_embeddings: int
    bos_token_id: int = 1
    eos_token_id: int = 2


_LLAMA_1, _LLAMA_2, _CODE_LLAMA = _Release("Llama 1", 2048), _Release("Llama 2", 4096), _Release("Code Llama", 16384)
_LLAMA_3, _LLAMA_3_1 = (_Release("Llama 3", 8192, 128000, 128001), _Release("Llama 3.1", 131072, 128000, 128001))


def read_params(root: Path, embedding: StoredTensor, num_parts: int, is_tied: bool, max_nbytes: int) -> SourceConfig:
    """Read params.json, of at most `max_nbytes`, of a model with this embedding in its first part. Raises SourceError,
    or Refused with all problems."""
    raw, doubts = read_json_with_notes(root, PARAMS_NAME, max_nbytes, _UNDERSTOOD | {"model"})
    if message := answer(raw, "dim"):
        raise Cause(f"{quoted(PARAMS_NAME)} in {quoted(root)} {message}")
    params: Mapping[str, Any] = raw["model"] if isinstance(raw.get("model"), dict) else raw
    reader = ConfigReader(params, PARAMS_NAME)
    sizes = _sizes(reader, embedding, num_parts)
    is_scaled = reader.flag("use_scaled_rope", False)
    reader.problems.raise_if_any()
    release = _release_of(sizes["vocab_size"], sizes["rope_theta"], sizes["rms_norm_eps"], is_scaled)
    taken = release._asdict()
    del taken["name"]
    keys = sizes | taken | {
        "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": is_tied,
        "rope_scaling": {"rope_type": "llama3"} if is_scaled else None, "sliding_window": params.get("sliding_window")}
    listed = ", ".join(f"{key} {value}" for key, value in taken.items())
    return parse_config(keys, PARAMS_NAME, (
        f"{PARAMS_NAME} gives no context length and no token ids; those of {release.name} are taken: {listed}; a "
        f"config.json beside it is taken in its place", *_unknown(params), *doubts))


def _sizes(reader: ConfigReader, embedding: StoredTensor, num_parts: int) -> dict[str, Any]:
    """The keys of a config.json for sizes and constants. Problems are collected in the reader."""
    dim, heads = reader.number("dim", int), reader.number("n_heads", int)
    multiple = reader.number("multiple_of", int, 256)
    ffn = int(reader.number("ffn_dim_multiplier", float, 1.0) * int(8 * dim / 3))
    rows, columns = embedding.shape
    if reader.raw.get("vocab_size") not in (None, -1):  # -1: as many as the tokenizer has.
        rows = reader.number("vocab_size", int)
    elif columns == dim:
        rows *= num_parts
    return {"hidden_size": dim, "intermediate_size": multiple * -(-ffn // multiple),
            "num_hidden_layers": reader.number("n_layers", int), "num_attention_heads": heads,
            "num_key_value_heads": reader.number("n_kv_heads", int, heads), "vocab_size": rows,
            "rms_norm_eps": reader.number("norm_eps", float),
            "rope_theta": reader.number("rope_theta", float, _ROPE_THETA)}


def _release_of(vocab_size: int, rope_theta: float, norm_eps: float, is_scaled: bool) -> _Release:
    if vocab_size > _LLAMA_3.eos_token_id:
        return _LLAMA_3_1 if is_scaled else _LLAMA_3
    if rope_theta > _ROPE_THETA:
        return _CODE_LLAMA
    return _LLAMA_2 if norm_eps == 1e-5 else _LLAMA_1


def _unknown(params: Mapping[str, Any]) -> list[str]:
    """A remark on keys that are not understood."""
    unknown = sorted(key for key in params.keys() - _UNDERSTOOD - _WITHOUT_EFFECT if params[key] is not None)
    return [f"{PARAMS_NAME} keys not understood, ignored: {', '.join(map(quoted, unknown))}"] if unknown else []
