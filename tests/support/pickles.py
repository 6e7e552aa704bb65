"""Folders with pytorch_model*.bin, made from the safetensors of other folders."""
import json
import shutil
from collections import OrderedDict

import torch
from sources import INDEX, make_source, read
from torch_files import saved

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
NORM, Q, HEAD, EMBEDDING = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight",
                            "model.embed_tokens.weight")


def tensors_of(path):
    """The tensors of a shard as torch has them."""
    return OrderedDict((key, torch.from_numpy(array.copy()).view(torch.bfloat16)) for key, array in read(path).items())


def pickle_shards(root, change=lambda tensors: None, **how):
    """The same folder with files of torch.save in place of its shards, and their names in the index."""
    for path in root.glob("*.safetensors"):
        tensors = tensors_of(path)
        change(tensors)
        saved(tensors, root, f"pytorch_{path.stem}.bin", **how)
        path.unlink()
    if (root / INDEX).exists():
        index = json.loads((root / INDEX).read_text())
        index["weight_map"] = {key: f"pytorch_{name[:-11]}bin" for key, name in index["weight_map"].items()}
        (root / BIN_INDEX).write_text(json.dumps(index))
        (root / INDEX).unlink()
    return root


def pair(tmp_path, change=lambda tensors: None, **how):
    """(a source in safetensors, the same model in pickled files)."""
    root = make_source(tmp_path / "hf", **how)
    return root, pickle_shards(shutil.copytree(root, tmp_path / "bin"), change)


def files(root):
    """Every file of a copy, but those that name the source; headers without the spaces that pad them, as these follow
    the source's places."""
    found = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()
             and path.name not in ("stream_reshard.json", "config.yaml", "README.md")}
    for path in found:
        if path.suffix == ".safetensors":
            begin = 8 + int.from_bytes(found[path][:8], "little")
            found[path] = found[path][8:begin].rstrip(b" "), found[path][begin:]
    return found
