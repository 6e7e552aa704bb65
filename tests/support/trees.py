"""Checkpoints of every kind, and an oracle of where each weight stands.

The oracle reads bytes and header text with numpy and has its own table of names; no code of the package is in it.
"""
import json
import re
from pathlib import Path

import numpy as np
from running import call
from sources import CONFIG, make_source, make_tensors, shapes_of

from stream_reshard.storage.header import pack_header

MANIFEST, EMBEDDING, NORM = "stream_reshard.json", "token_embedding", "final_layer_norm"

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
"""Where the checkpoints lie that Nanotron itself saved."""

SAID = {"rope_theta": 5e5, "initializer_range": 0.01, "pad_token_id": 3}
"""With this no value in a config is the one that a reader would take for it if it were absent."""

OLD = {"initializer_range": 0.01}
"""The same for release 0.4, which has one rope_theta."""

FLOAT = {"config": SAID | {"torch_dtype": "float32"},
         "extra": {key: array.astype(np.float32)
                   for key, array in make_tensors(shapes_of("llama", CONFIG, False)).items()}}
"""A float32 model of whole numbers up to 65535: too long for bfloat16, which must round them."""

ROUNDED = {"extra": {key: ((bits := array.view(np.uint32)) + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
                     for key, array in FLOAT["extra"].items()}}
"""The same rounded to bfloat16, to nearest even, without torch."""

RAISED = {"config": FLOAT["config"],
          "extra": {key: (array.astype(np.uint32) << 16).view(np.float32) for key, array in ROUNDED["extra"].items()}}
"""And that in float32 again."""

KINDS = {
    "hf": ({}, None), "hf3": ({"num_shards": 3}, None), "tp1": ({}, []), "tp2pp2": ({}, ["--tp", "2", "--pp", "2"]),
    "interleaved": ({}, ["--tp", "2", "--pp", "2", "--rope", "interleaved"]), "padded": ({}, ["--vocab-multiple", "8"]),
    "tied_hf": ({"tied": True}, None), "tied_hf3": ({"tied": True, "num_shards": 3}, None),
    "tied_tp2": ({"tied": True}, ["--tp", "2"]),
    "tied_padded": ({"tied": True}, ["--pp", "2", "--vocab-multiple", "8"]),
    "qwen2_hf": ({"family": "qwen2"}, None), "qwen2_tp2": ({"family": "qwen2"}, ["--tp", "2", "--pp", "2"]),
    "qwen2_interleaved": ({"family": "qwen2"}, ["--rope", "interleaved"]),
    "old_hf": ({"config": OLD}, None), "1.2": ({"config": OLD}, ["--checkpoint-version", "1.2", "--pp", "2"]),
    "1.4": ({"config": OLD}, ["--checkpoint-version", "1.4", "--tp", "2"]),
    "float_hf": (FLOAT, None), "float_cast": (FLOAT, ["--tp", "2", "--dtype", "bfloat16"]),
    "rounded_hf": (ROUNDED, None),
    "raised_hf": (RAISED, None), "rounded_tp2": (ROUNDED, ["--tp", "2", "--pp", "2"])}
"""(what make_source is told, flags of the conversion or None where there is none), by name."""


def make(root, kind):
    """Make a checkpoint of a kind below `root`, with two companions; returns its folder."""
    told, flags = KINDS[kind]
    source = make_source(root / kind / "hf", **{"config": SAID} | told)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    if flags is None:
        return source
    assert call(source, root / kind / "nt", "--quiet", *flags) == 0
    return root / kind / "nt"


def write_sparse_source(root, vocab, hidden=1024):
    """A one-layer Llama with a vast embedding of zeros that takes no disk: (vocab, hidden) in bfloat16."""
    root.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": 512,
              "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": vocab, "tie_word_embeddings": True}
    (root / "config.json").write_text(json.dumps(config))
    square = (hidden, hidden)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate_proj": (512, hidden),
             "mlp.up_proj": (512, hidden), "mlp.down_proj": (hidden, 512)}
    layer |= {f"self_attn.{x}_proj": square for x in "qkvo"}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    header = pack_header([(key, "BF16", shape) for key, shape in shapes.items()], {})
    nbytes = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    with open(root / "model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + nbytes)


def raw_of(path):
    """(header, offset of the data, all bytes) of a safetensors file."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), begin, raw


class Oracle:
    """Where every weight of a checkpoint stands, and its bits, by its Hugging Face name.

    A place counts the elements of all tensors, one behind the other. The files of a Nanotron parameter are put together
    by the slices in their headers, cut into q, k, v, gate, up, and cropped to the vocabulary.
    """

    def __init__(self, root, vocab_size=11):
        self.root, self.tensors, self.places = root, [], {}
        if (root / "model").is_dir():
            config = json.loads((root / "model_config.json").read_text())
            for name, whole in self._wholes().items():
                self.places |= dict(_named(name, whole, config, vocab_size))
        else:
            for path in sorted(root.glob("*.safetensors")):
                self.places |= self._opened(path)
        self.bits = np.concatenate([bits for *_, bits in self.tensors])

    def _opened(self, path):
        table, begin, raw = raw_of(path)
        found = {}
        for key, entry in table.items():
            if key != "__metadata__":
                first, last = entry["data_offsets"]
                bits = np.frombuffer(raw[begin + first:begin + last], "u4" if entry["dtype"] == "F32" else "u2")
                start = sum(bits.size for *_, bits in self.tensors)
                found[key] = np.arange(start, start + bits.size).reshape(entry["shape"])
                self.tensors.append((path.relative_to(self.root).as_posix(), begin + first, found[key], bits))
        return found

    def _wholes(self):
        wholes = {}
        for path in sorted((self.root / "model").rglob("*.safetensors")):
            local, metadata = self._opened(path)["data"], raw_of(path)[0].get("__metadata__")
            folder = path.parent.relative_to(self.root / "model" / "model")
            suffix = re.match("model_([a-z]+)", path.name)
            name = ".".join([*folder.parts, suffix[1]])
            if not metadata:
                wholes[name] = local
                continue
            shape = [int(n) for n in re.findall(r"\d+", metadata["unsharded_shape"])]
            whole = wholes.setdefault(name, np.full(shape, -1))
            for pair in metadata["local_global_slices_pairs"].split(";"):
                here, there = (tuple(slice(*(None if n == "None" else int(n) for n in part.split(",")))
                                     for part in side.split("|")) for side in pair.split("#"))
                whole[there] = local[here]
        return wholes

    def spot(self, place):
        """(file, index in its tensor, byte in the file) of a place."""
        for file, begin, places, bits in self.tensors:
            if places.flat[0] <= place <= places.flat[-1]:
                index = [int(n) for n in np.argwhere(places == place)[0]]
                return file, index, begin + int(place - places.flat[0]) * bits.itemsize
        raise AssertionError(f"nothing stands at {place}")

    def values(self, key, itemsize):
        """The bits of one parameter; rounded to nearest even, or filled up with zeros, where they have another size."""
        bits = self.bits[self.places[key]]
        if bits.itemsize > itemsize:
            return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
        return bits if bits.itemsize == itemsize else bits.astype(np.uint32) << 16

    def first_difference(self, key, source):
        """What verify must say of one parameter where it is not what the source has: the first difference."""
        have, want = self.values(key, self.bits.itemsize), source.values(key, self.bits.itemsize)
        where = tuple(int(n) for n in np.argwhere(have != want)[0])
        (file, local, _), (other, there, _) = self.spot(self.places[key][where]), source.spot(source.places[key][where])
        return (f"'{file}': {key} {list(where)} is {_printed(have[where])} at {local} of the file; the source has "
                f"{_printed(want[where])} ('{other}', {there})")


def _printed(bits):
    """A weight as messages show it: bfloat16 where it has two bytes, float32 where it has four."""
    value = np.uint32(int(bits) << (16 if bits.itemsize == 2 else 0)).view(np.float32)
    return f"{value:.6g} (0x{int(bits):0{2 * bits.itemsize}x})"


def _named(name, whole, config, vocab_size):
    """(Hugging Face name, places) of what one Nanotron parameter holds."""
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    d, ffn = hidden // heads, config["intermediate_size"]
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("decoder"):
        names = {"token_position_embeddings": "model.embed_tokens", "final_layer_norm": "model.norm",
                 "lm_head": "lm_head"}
        yield f"{names[stem.split('.')[0]]}.{suffix}", whole if stem.startswith("final") else whole[:vocab_size]
        return
    _, layer, _, rest = stem.split(".", 3)
    rows = {"attn.qkv_proj": {"self_attn.q_proj": heads * d, "self_attn.k_proj": kv_heads * d,
                              "self_attn.v_proj": None},
            "mlp.gate_up_proj": {"mlp.gate_proj": ffn, "mlp.up_proj": None}, "attn.o_proj": {"self_attn.o_proj": None}}
    for part, size in rows.get(rest, {rest: None}).items():
        own, whole = (whole, None) if size is None else (whole[:size], whole[size:])
        if part.endswith(("q_proj", "k_proj")) and config.get("rope_interleaved", True):
            turned = own.reshape(-1, d, *own.shape[1:])
            own = turned[:, [*range(0, d, 2), *range(1, d, 2)]].reshape(own.shape)
        yield f"model.layers.{layer}.{part}.{suffix}", own
