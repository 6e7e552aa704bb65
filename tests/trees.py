"""What the tests of verify need: checkpoints of every kind, an oracle of where each weight stands, ways to break a folder.

The oracle reads bytes and header text with numpy and has its own table of names; no code of the package is in it.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import xxhash
from sources import CONFIG, make_source, make_tensors, raw_file, shapes_of

from stream_reshard.cli import main

ROOT = Path(__file__).parents[1]

SAID = {"rope_theta": 5e5, "initializer_range": 0.01, "pad_token_id": 3}
"""With this no value in a config is the one that a reader would take for it if it were absent."""

OLD = {"initializer_range": 0.01}
"""The same for release 0.4, which has one rope_theta."""

FLOAT = {"extra": {key: array.astype(np.float32)
                   for key, array in make_tensors(shapes_of("llama", CONFIG, False)).items()}}
"""A float32 model of whole numbers up to 65535: too long for bfloat16, which must round them."""

ROUNDED = {"extra": {key: ((bits := array.view(np.uint32)) + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
                     for key, array in FLOAT["extra"].items()}}
"""The same rounded to bfloat16, to nearest even, without torch."""

RAISED = {"extra": {key: (array.astype(np.uint32) << 16).view(np.float32) for key, array in ROUNDED["extra"].items()}}
"""And that in float32 again."""

KINDS = {
    "hf": ({}, None), "hf3": ({"num_shards": 3}, None), "tp1": ({}, []), "tp2pp2": ({}, ["--tp", "2", "--pp", "2"]),
    "interleaved": ({}, ["--tp", "2", "--pp", "2", "--rope", "interleaved"]), "padded": ({}, ["--vocab-multiple", "8"]),
    "tied_hf": ({"tied": True}, None), "tied_hf3": ({"tied": True, "num_shards": 3}, None),
    "tied_tp2": ({"tied": True}, ["--tp", "2"]), "tied_padded": ({"tied": True}, ["--pp", "2", "--vocab-multiple", "8"]),
    "qwen2_hf": ({"family": "qwen2"}, None), "qwen2_tp2": ({"family": "qwen2"}, ["--tp", "2", "--pp", "2"]),
    "qwen2_interleaved": ({"family": "qwen2"}, ["--rope", "interleaved"]),
    "old_hf": ({"config": OLD}, None), "1.2": ({"config": OLD}, ["--checkpoint-version", "1.2", "--pp", "2"]),
    "1.4": ({"config": OLD}, ["--checkpoint-version", "1.4", "--tp", "2"]),
    "float_hf": (FLOAT, None), "float_cast": (FLOAT, ["--tp", "2", "--dtype", "bfloat16"]), "rounded_hf": (ROUNDED, None),
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


def call(*arguments):
    """What the command ends with; argparse raises SystemExit. A test process holds much, and what hangs there hangs."""
    limits = [] if arguments[0] == "inspect" else ["--max-memory", "8GiB"]
    limits += [] if arguments[0] == "inspect" or "--workers" in arguments else ["--workers", "1"]
    try:
        return main([*map(str, arguments), *limits])
    except SystemExit as stop:
        return stop.code


class TooLong(BaseException):
    """No exception that the package could take for its own."""


@contextmanager
def deadline(seconds):
    """Ends what hangs, such as the opening of a pipe that nobody writes to."""
    def handle(number, frame):
        raise TooLong

    before, is_late = signal.signal(signal.SIGALRM, handle), False
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong:
        is_late = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_late, f"not done after {seconds} s"


def measured(*arguments):
    """(exit code, peak of the process tree's summed resident set in bytes, stderr) of a command in its own process."""
    command = [sys.executable, "-m", "stream_reshard", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in [tree, *tree.children(recursive=True)]))
        except psutil.Error:
            pass
        time.sleep(0.003)
    return process.returncode, peak, process.stderr.read()


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
            folder, suffix = path.parent.relative_to(self.root / "model" / "model"), re.match("model_([a-z]+)", path.name)
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
        names = {"token_position_embeddings": "model.embed_tokens", "final_layer_norm": "model.norm", "lm_head": "lm_head"}
        yield f"{names[stem.split('.')[0]]}.{suffix}", whole if stem.startswith("final") else whole[:vocab_size]
        return
    _, layer, _, rest = stem.split(".", 3)
    rows = {"attn.qkv_proj": {"self_attn.q_proj": heads * d, "self_attn.k_proj": kv_heads * d, "self_attn.v_proj": None},
            "mlp.gate_up_proj": {"mlp.gate_proj": ffn, "mlp.up_proj": None}, "attn.o_proj": {"self_attn.o_proj": None}}
    for part, size in rows.get(rest, {rest: None}).items():
        own, whole = (whole, None) if size is None else (whole[:size], whole[size:])
        if part.endswith(("q_proj", "k_proj")) and config.get("rope_interleaved", True):
            turned = own.reshape(-1, d, *own.shape[1:])
            own = turned[:, [*range(0, d, 2), *range(1, d, 2)]].reshape(own.shape)
        yield f"model.layers.{layer}.{part}.{suffix}", own


def poke(path, offset, bit=0):
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def every(root, *words):
    """The files below a folder whose paths hold all words, sorted."""
    found = sorted(path for path in root.rglob("*") if not path.is_dir() and all(word in str(path) for word in words))
    assert found, f"no file of {words}"
    return found


def swap(root, word, data_only=False):
    """Exchange the files of tensor-parallel ranks 0 and 1, or only what follows their headers."""
    one, other = every(root, word, "tp-rank-0")[0], every(root, word, "tp-rank-1")[0]
    (_, a, first), (_, b, second) = raw_of(one), raw_of(other)
    one.write_bytes(first[:a] + second[b:] if data_only else second)
    other.write_bytes(second[:b] + first[a:] if data_only else first)


def unshard(root, word):
    """One file, as of a parameter that is not sharded, in place of the rank files of one that is split by rows."""
    paths = every(root, word, "-rank-")
    data = b"".join(raw[begin:] for _, begin, raw in map(raw_of, paths))
    entry = raw_of(paths[0])[0]["data"] | {"data_offsets": [0, len(data)]}
    entry["shape"][0] *= len(paths)
    paths[0].with_name("model_weight.safetensors").write_bytes(raw_file(json.dumps({"data": entry}), data))
    for path in paths:
        path.unlink()


def rename(root, word, old, new):
    """Another name for the files whose path holds `word`."""
    for path in every(root, word, old):
        (target := Path(str(path).replace(old, new))).parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def edit_header(root, old, new, *words, count=None):
    """Change the header text of `count` files, or all; its length may change."""
    for path in every(root, *words, ".safetensors")[:count]:
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        assert old.encode() in raw[:begin], (old, raw[:begin])
        text = raw[8:begin].replace(old.encode(), new.encode()).rstrip()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[begin:])


def edit_json(root, name, **changes):
    """Change keys of a JSON file; the value `...` takes a key out."""
    changed = json.loads((root / name).read_text()) | changes
    (root / name).write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def edit_yaml(root, old, new):
    """Change the text of config.yaml."""
    text = (root / "config.yaml").read_text()
    assert old in text, old
    (root / "config.yaml").write_text(text.replace(old, new, 1))


def replace(path, make, *arguments):
    """Something else under the name of a file: a link, a pipe, a folder."""
    path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
    make(*arguments, path)


def forge(root, change):
    """Change the manifest and give it the digest that it then must have."""
    path = root / "stream_reshard.json"
    value = json.loads(path.read_text())
    del value["xxh3_128"]
    change(value)
    rest = json.dumps(value, indent=1)[2:].encode()
    path.write_bytes(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128(rest).hexdigest().encode() + rest)


_OPENED = []


def _note(event, arguments):
    if event == "open" and _OPENED:
        _OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "")


@contextmanager
def opened():
    """The paths that are opened meanwhile, absolute; an audit hook cannot be taken away, so it stays and notes nothing."""
    if not getattr(opened, "is_hooked", False):
        sys.addaudithook(_note)
        opened.is_hooked = True
    found = []
    _OPENED.append("")
    try:
        yield found
    finally:
        found.extend(os.path.abspath(path) for path in _OPENED if path)
        _OPENED.clear()
