"""Reasons why a path is no checkpoint, or a folder has no readable weights: the one cause, and its cure.

These functions run after opening failed. They read names and the beginnings of a few small files, no weights.
"""
from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import Cause, SourceError, StreamReshardError, quoted, shell_word
from stream_reshard.formats.config_json import CONFIG_NAME, INDEX_NAME, PICKLED_INDEX_NAME, PICKLED_NAME, SINGLE_NAME
from stream_reshard.formats.meta.params import PARAMS_NAME
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.storage.small_files import dangling, read_capped, read_error, read_json

_MARKERS = (CONFIG_NAME, MODEL_CONFIG_NAME, PARAMS_NAME)
"""Files that make a folder a checkpoint of any format."""

_HUB_ID = re.compile(r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/+)?"
                     r"([A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}?)(?:/(?:tree|resolve|blob)/.*)?", re.ASCII)

_CACHE_NAME = re.compile(r"models--([\w.\-]+?)--([\w.\-]+)", re.ASCII)

_ADAPTER_CONFIG = "adapter_config.json"

_UNFINISHED = ("*.incomplete", "*.aria2", "*.part", "*.crdownload", "*.!qB", "*.filepart")
"""Names of files of an unfinished download, or of the records that a downloader keeps beside them."""

_OTHER_FORMATS = (
    ("*.gguf", "GGUF files of llama.cpp", "take the repository with safetensors, or let transformers read it: "
     "AutoModelForCausalLM.from_pretrained(SRC, gguf_file=NAME).save_pretrained(NEW)"),
    ("tf_model*.h5", "TensorFlow weights", "take the repository with safetensors, or convert them with transformers 4: "
     "AutoModelForCausalLM.from_pretrained(SRC, from_tf=True).save_pretrained(NEW)"),
    ("flax_model*.msgpack", "Flax weights", "take the repository with safetensors, or convert them with transformers "
     "4: AutoModelForCausalLM.from_pretrained(SRC, from_flax=True).save_pretrained(NEW)"),
    ("*.distcp", "a distributed checkpoint of PyTorch", "save the model with save_pretrained where it was trained"),
    ("*.onnx", "an ONNX model", "take the repository with safetensors"),
    ("*.nemo", "a NeMo archive", "export it to Hugging Face with NeMo first"))
"""(name pattern, noun phrase, cure) of weights in formats that are not read here."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_MAX_LISTED = 5
"""Folders that are named in a message."""

_MAX_NAMES = 10**5
"""Names that are read of a folder."""


def no_checkpoint(root: Path) -> SourceError:
    """Reason why `root` is no checkpoint of any format."""
    if not os.path.isdir(root):
        return _no_folder(root)
    names = _names(root)
    return (dangling(root, CONFIG_NAME) or _cache_folder(root) or _foreign(root, names) or _elsewhere(root, names) or
            SourceError(f"{quoted(root)} holds neither {' nor '.join(_MARKERS)}: it is not a Hugging Face checkpoint, "
                        f"not a committed checkpoint of Nanotron, and not Meta's"))


def no_weights(root: Path) -> SourceError:
    """Reason why a folder with config.json holds no weights that are read here: neither a single shard nor an index."""
    names = _names(root)
    for name in (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME):
        if cause := dangling(root, name):
            return cause
    shards = [name for name in names if name.endswith(".safetensors")]
    if (cause := _foreign(root, names)) and not any(name.startswith("model") for name in shards):
        return cause
    index, shards = (INDEX_NAME, shards) if shards else (
        PICKLED_INDEX_NAME, [name for name in names if fnmatch(name, "pytorch_model*.bin")])
    more = f"; {left}" if (left := unfinished(root)) else ""
    if shards:
        return SourceError(f"{quoted(root)} holds {len(shards)} shards such as {quoted(shards[0])}, but no "
                           f"{index}{more or '; download it, it names the shard of each tensor'}")
    if pickled := next((name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLED)), None):
        return Cause(f"{quoted(root)} holds pickled weights ({quoted(pickled)}) under a name that is not read (of such "
                     f"files {PICKLED_NAME} and its shards are); convert them where you trust them: "
                     f"AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(NEW)")
    return SourceError(f"{quoted(root)} holds neither {SINGLE_NAME} nor {INDEX_NAME}, nor {PICKLED_NAME}: it is not a "
                       f"Hugging Face checkpoint{more or ', or its weights are still to be downloaded'}")


def unfinished(root: Path) -> str | None:
    """A clause that names a file of an unfinished download, in the folder or its download cache; None without one."""
    folders = [root, root / ".cache" / "huggingface" / "download"]
    if root.parent.name == "snapshots":
        folders.append(root.parent.parent / "blobs")
    for folder in filter(os.path.isdir, folders):
        for name in _names(folder):
            if any(fnmatch(name, pattern) for pattern in _UNFINISHED):
                return f"{quoted(folder / name)} is from a download that was not finished; run the download again"
    return None


def above(root: Path) -> Cause | None:
    """The cause where the parent folder is a checkpoint, as that of `original`, `model` or `onnx` is; else None."""
    parent = Path(os.path.abspath(root)).parent
    if any(os.path.isfile(parent / marker) for marker in _MARKERS):
        return Cause(f"{quoted(root)} is a part of a checkpoint, not the whole: give {quoted(parent)}")
    return None


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted. Raises SourceError where the folder may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, _MAX_NAMES) if not entry.name.startswith("._"))
    except OSError as error:
        raise read_error(quoted(folder), error) from error


def _no_folder(root: Path) -> SourceError:
    text = str(root)
    if os.path.islink(root):
        where = "leads to itself" if os.readlink(root) == root.name else "does not lead to a folder"
        return Cause(f"{quoted(root)} is not a folder: it is a link to {quoted(os.readlink(root))}, which {where}")
    if os.path.exists(root):
        parent = Path(os.path.abspath(root)).parent
        if root.suffix == ".gguf":
            return _foreign(parent, [root.name]) or SourceError(text)
        return Cause(f"{quoted(root)} is not a folder but a file; give the folder that holds the checkpoint, such as "
                     f"{quoted(parent)}")
    if root.name and os.path.isdir(staging := staging_of(root)):
        return Cause(f"{quoted(root)} does not exist; {quoted(staging)} is what a stopped run to it has written: give "
                     f"the command of that run again")
    if match := _HUB_ID.fullmatch(text):
        return Cause(f"{quoted(root)} is not a folder; if it is a model on the Hugging Face Hub, download it first: "
                     f"hf download {match[1]} --local-dir {shell_word(match[1].split('/')[1])}")
    return SourceError(f"{quoted(root)} is not a folder: it does not exist")


def _cache_folder(root: Path) -> Cause | None:
    """The cause for a model's folder in huggingface_hub's cache (models--org--name), or for its blobs, refs, snapshots.

    Names the snapshot of the main branch, or else the newest one.
    """
    model = next((path for path in (root, root.parent) if _CACHE_NAME.fullmatch(path.name)), None)
    if model is None or not (snapshots := model / "snapshots").is_dir():
        return None
    try:
        commit = read_capped(model, "refs/main", 100, 100).decode("ascii", "replace").strip()
    except StreamReshardError:
        commit = ""
    if not commit or "/" in commit or not (snapshots / commit).is_dir():
        commits = (name for name in _names(snapshots) if os.path.isdir(snapshots / name))
        commit = max(commits, key=lambda name: ((snapshots / name).stat().st_mtime, name), default="")
    if not commit:
        return Cause(f"{quoted(root)} is a folder of the Hugging Face cache without a snapshot: download it again")
    return Cause(f"{quoted(root)} is a folder of the Hugging Face cache; its snapshots are the checkpoints: give "
                 f"{quoted(snapshots / commit)}")


def _foreign(root: Path, names: list[str]) -> Cause | None:
    """The cause where the names in a folder are those of a LoRA adapter, or of weights in another format; else None."""
    if _ADAPTER_CONFIG in names:
        return _adapter(root)
    if any(fnmatch(name, "consolidated*.safetensors") for name in names):
        return above(root) or Cause(
            f"{quoted(root)} holds the original format of Mistral (consolidated.safetensors, params.json); download "
            f"the shards in the format of Hugging Face (model*.safetensors, config.json), or convert it with "
            f"convert_mistral_weights_to_hf.py of transformers' repository")
    for pattern, weights, cure in _OTHER_FORMATS:
        if name := next((name for name in names if fnmatch(name, pattern)), None):
            return Cause(f"{quoted(root)} holds {weights} ({quoted(name)}), which cannot be read here; {cure}")
    return None


def _adapter(root: Path) -> Cause:
    try:
        base = read_json(root, _ADAPTER_CONFIG, matters=()).get("base_model_name_or_path")
    except StreamReshardError:
        base = None
    of = f" of {quoted(base)}" if base else ""
    return Cause(f"{quoted(root)} holds a LoRA adapter{of}, not a model; merge it into its base first: "
                 f"peft.AutoPeftModelForCausalLM.from_pretrained(SRC).merge_and_unload().save_pretrained(NEW)")



def _elsewhere(root: Path, names: list[str]) -> Cause | None:
    """The cause where folders in this one are checkpoints, or the parent folder is one; else None."""
    inner = [name for name in names[:1000] if any(os.path.isfile(root / name / marker) for marker in _MARKERS)]
    if len(inner) == 1:
        return Cause(f"{quoted(root)} is not a checkpoint, but its folder {quoted(inner[0])} is one: give "
                     f"{quoted(root / inner[0])}")
    if inner:
        inner.sort(key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        more = f" and {len(inner) - _MAX_LISTED} more" if len(inner) > _MAX_LISTED else ""
        last = ", ".join(map(quoted, inner[-_MAX_LISTED:]))
        return Cause(f"{quoted(root)} is not a checkpoint, but its folders {last}{more} are: give one of them")
    return above(root)
