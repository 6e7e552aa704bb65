"""Small training checkpoints as Nanotron's trainer saves them, made without torch and Nanotron.

`make_training` gives one model the same state at every topology: each number is a function of the parameter, the kind
of state and the index in the whole parameter (`values`). Masters round to the weights, some of them upwards. The cut is
taken from the slices in the headers below model/, that of ZeRO-1 from `zero_parts`.

`load` and `save` take a .pt file apart: its values with numpy arrays in the place of tensors (bfloat16 as uint16), and
back; arrays that are views of one array share a storage, and have gradients, as masters.
"""
import json
import re
import zlib

import numpy as np
from running import call
from sources import CONFIG, DTYPES, make_source, make_tensors, shapes_of
from trees import raw_of

from stream_reshard.formats.nanotron.config import read_model_config
from stream_reshard.formats.nanotron.rules import NanotronRules, stages_of
from stream_reshard.model.topology import Topology
from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_values import TensorReference, new_storage, new_tensor
from stream_reshard.storage.torch_writer import folder_of, plan_torch_file, stream

STEP, BATCH, LENGTH = 4, 12, 64
SAMPLES = STEP * BATCH
"""Of every checkpoint: steps done, samples of a step (2, 3 and 4 replicas can share them), tokens of a sample; samples
consumed."""

NAMES = {
    "LlamaConfig": ("input_layernorm.weight", "attn.qkv_proj.weight", "attn.o_proj.weight",
                    "post_attention_layernorm.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    "Qwen2Config": ("input_layernorm.weight", "post_attention_layernorm.weight", "attn.qkv_proj.weight",
                    "attn.qkv_proj.bias", "attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
                    "mlp.router.weight", "mlp.shared_expert.gate_up_proj.weight", "mlp.shared_expert.down_proj.weight",
                    "mlp.shared_expert_gate.weight", "mlp.experts.merged_gate_up_proj",
                    "mlp.experts.merged_down_proj")}
"""The parameters of a layer, in the order of each config class; a model has some of them."""

EMBEDDING, NORM, HEAD = ("token_position_embeddings.pp_block.token_embedding.weight", "final_layer_norm.pp_block.weight",
                         "lm_head.pp_block.weight")


def make_training(root, *, family="llama", tied=False, config={}, tp=1, pp=1, dp=1, zero=0, masters=True, flags=()):
    """Write a checkpoint to the new folder `root`, and return it; `flags`: more of the conversion that makes model/."""
    config = {"vocab_size": 12} | config  # No padding at TP=2.
    sizes = CONFIG | config
    tensors = make_tensors(shapes_of(family, sizes, tied))
    extra = {key: array & 0xBFFF for key, array in tensors.items() if not key.endswith("mlp.gate.weight")}  # Finite.
    source = make_source(root.with_name(root.name + "-source"), family=family, tied=tied, config=config, extra=extra)
    assert call(source, root, "--quiet", "--tp", tp, "--pp", pp, "--dp", dp, *flags) == 0
    (root / "stream_reshard.json").unlink()
    write_states(root, tp, pp, dp, zero, masters)
    return root


def write_states(root, tp, pp, dp, zero=0, masters=True):
    """The states beside the weights of a checkpoint of this topology."""
    order, stages, pieces = parameters_of(root, pp), stages_by_name(root, pp), read_pieces(root)
    for stage in range(pp):
        names = [name for name in order if stages[name] == stage]
        if HEAD not in order and pp > 1 and stage == stages[HEAD]:
            names.append(EMBEDDING)  # Tied, and on two stages: the copy comes last, under the same name.
        for rank in range(tp):
            shards = [(name, shard_of(pieces, name, rank)) for name in names]
            for part in range(dp if zero else 1):
                of = f"_dp-{part}-of-{dp}" if zero else ""
                save(root / f"optimizer/optimizer_pp-{stage}-of-{pp}{of}_tp-{rank}-of-{tp}_exp-0-of-1.pt",
                     optimizer_state(shards, part, dp if zero else 1, bool(zero), masters))
            if has_data_stages(root):
                save(root / f"lr_scheduler/lr_scheduler_pp-{stage}-of-{pp}_tp-{rank}-of-{tp}_exp-0-of-1.pt",
                     schedule_of(names))
            elif (stage, rank) == (0, 0):
                save(root / "lr_scheduler/lr_scheduler.pt", schedule_of(names))
            for part in range(dp):
                save(root / f"random/tp-{rank}-of-{tp}_dp-{part}-of-{dp}_pp-{stage}-of-{pp}.pt", {})
    first = [(name, shard_of(pieces, name, 0)) for name in order if stages[name] == 0]
    write_documents(root, optimizer_config(first, tp, pp, dp, zero, masters), dp, zero, masters)


def parameters_of(root, pp):
    """The names of the parameters that a checkpoint holds, in the order of Nanotron's modules."""
    config = json.loads((root / "model_config.json").read_text())
    found, of_layer = read_pieces(root), NAMES["Qwen2Config" if "is_qwen2_config" in config else "LlamaConfig"]
    layers = [f"decoder.{layer}.pp_block.{name}" for layer in range(config["num_hidden_layers"]) for name in of_layer]
    return [name for name in (EMBEDDING, *layers, NORM, HEAD) if name in found]


def stages_by_name(root, pp):
    """The stage of each parameter, and of the head, tied or not."""
    config = read_model_config(root).model
    stages, names = stages_of(config, NanotronRules(Topology(pp=pp))), {*read_pieces(root), HEAD}
    return {name: stages[name.split(".pp_block")[0]] for name in names}


def read_pieces(root):
    """{parameter: {rank, None where it is not sharded: (bits, index in the unsharded array of each element)}}."""
    found = {}
    for path in sorted((root / "model").rglob("*.safetensors")):
        header, begin, raw = raw_of(path)
        entry, metadata = header["data"], header.get("__metadata__")
        bits = np.frombuffer(raw[begin:], "u4" if entry["dtype"] == "F32" else "u2").reshape(entry["shape"])
        name = ".".join([*path.parent.relative_to(root / "model/model").parts, re.match("model_([a-z_]+?)(_pp-|[.])", path.name)[1]])
        places = np.arange(bits.size).reshape(bits.shape)
        if metadata:
            shape = [int(n) for n in re.findall(r"\d+", metadata["unsharded_shape"].replace("np.int64", ""))]
            whole = np.arange(np.prod(shape)).reshape(shape)
            for pair in metadata["local_global_slices_pairs"].split(";"):
                here, there = (tuple(slice(*(None if n == "None" else int(n) for n in part.split(",")))
                                     for part in side.split("|")) for side in pair.split("#"))
                places[here] = whole[there]
        rank = int(re.search(r"tp-rank-(\d+)", path.name)[1]) if metadata else None
        found.setdefault(name, {})[rank] = bits, places
    return found


def shard_of(pieces, name, rank):
    """(bits of the weights, indices in the unsharded parameter) of what one tensor-parallel rank holds."""
    return pieces[name].get(rank) or pieces[name][None]


def values(name, kind, places, bits=None):
    """float32 of a state at these places; masters by the bits of the weights to which they round."""
    x = places.astype(np.uint64) + np.uint64(zlib.crc32(f"{kind}:{name}".encode()) << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    if kind != "master":
        unit = (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
        return np.abs(unit) * np.float32(2**-14) if kind == "exp_avg_sq" else unit * np.float32(2**-7)
    if bits.itemsize == 4:
        return bits.view(np.float32).copy()
    rest = (x >> np.uint64(40)).astype(np.int64) % 0xFFFF - 0x7FFF
    rest[(bits & 0x7FFF) == 0] = 0x123  # Nothing is below zero: only upwards.
    return (bits.astype(np.int64) * 0x10000 + rest).astype(np.uint32).view(np.float32)


def zero_parts(num_elements, num_ranks):
    """(start, stop) of the part of a flattened shard that each rank keeps: the last ones are shorter by one."""
    longest = -(-num_elements // num_ranks)
    num_short = longest * num_ranks - num_elements
    stops = np.cumsum([longest - (rank >= num_ranks - num_short) for rank in range(num_ranks)]).tolist()
    return list(zip([0, *stops], stops))


def rate_of(name):
    """A learning rate of its own for each parameter, as muP has."""
    return 0.003 * (1 + zlib.crc32(name.encode()) % 4)


def optimizer_state(shards, part, num_parts, is_flat, masters):
    """The state that one rank keeps of these (name, shard)."""
    state, groups, names, kept = {}, [], {}, []
    betas = (0.9, 0.95)
    for name, (bits, places) in shards:
        start, stop = zero_parts(bits.size, num_parts)[part]
        full, ids = f"model.{name}", []
        if start < stop:
            ids.append(number := len(state))
            names[number] = full
            cut = (lambda array: array.ravel()[start:stop]) if is_flat else (lambda array: array)
            moments = {kind: values(name, kind, cut(places)) for kind in ("exp_avg", "exp_avg_sq")}
            if not masters:
                moments = {kind: (array.view(np.uint32) >> 16).astype(np.uint16) for kind, array in moments.items()}
            state[number] = {"step": np.array(STEP, np.float32)} | moments
            kept.append((full, values(name, "master", cut(places), cut(bits))))
        groups.append({"lr": rate_of(name) / 2, "weight_decay": 0.0 if "norm" in name else 0.01, "betas": betas,
                       "eps": 1e-8, "fused": None, "initial_lr": rate_of(name), "params": ids})
    found = {"state": state, "param_groups": groups, "names": names}
    if masters:
        whole = np.concatenate([array.ravel() for _, array in kept])
        ends = np.cumsum([array.size for _, array in kept]).tolist()
        found["gradient_accumulator"] = {name: whole[end - array.size:end].reshape(array.shape)
                                         for (name, array), end in zip(kept, ends)}
    return found


def schedule_of(names):
    """The state of the schedule of one stage."""
    return {"base_lrs": [rate_of(name) for name in names], "last_epoch": STEP, "_step_count": STEP + 1,
            "_is_initial": False, "_get_lr_called_within_step": False, "_last_lr": [rate_of(name) / 2 for name in names],
            "lr_lambdas": [{} for _ in names]}


def optimizer_config(first, tp, pp, dp, zero, masters):
    """The JSON beside the optimizer's files; `first`: (name, shard) of rank 0 of the first stage."""
    kind = "ZeroDistributedOptimizer" if zero else "OptimizerFromGradientAccumulator" if masters else "NamedOptimizer"
    sizes = {"tp_size": tp, "dp_size": dp, "pp_size": pp, "expert_parallel_size": 1}
    configs = {"param_name_to_dp_rank_offsets": {
                   f"model.{name}": {str(rank): list(map(str, part)) for rank, part in enumerate(zero_parts(bits.size, dp)) if part[0] < part[1]}
                   for name, (bits, _) in first},
               "orig_param_shapes": {f"model.{name}": list(map(str, bits.shape)) for name, (bits, _) in first}}
    return {"type": kind, "parallelism": {key: str(size) for key, size in sizes.items()}, "configs": configs if zero else {}}


def has_data_stages(root):
    """False for format 1.2, which has one file for the schedule."""
    return "data_stages" in json.loads((root / "checkpoint_metadata.json").read_text())["metas"]


def write_documents(root, config, dp, zero, masters):
    """The documents of a training that has done STEP steps and is resumed from this folder."""
    (root / "optimizer/optimizer_config.json").write_text(json.dumps(config))
    metadata = json.loads((root / "checkpoint_metadata.json").read_text())
    metas = metadata["metas"] | {"last_train_step": STEP, "consumed_train_samples": SAMPLES}
    if "data_stages" in metas:
        metas["data_stages"][0] |= {"consumed_train_samples": SAMPLES}
    if "consumed_tokens_total" in metas:
        metas["consumed_tokens_total"] = SAMPLES * LENGTH
        metas["data_stages"][0] |= {"consumed_tokens_per_dataset_folder": {"data": SAMPLES * LENGTH}}
    (root / "checkpoint_metadata.json").write_text(json.dumps(metadata | {"metas": metas}, indent=2))
    text = (root / "config.yaml").read_text()
    text = re.sub("resume_checkpoint_path: null", lambda match: f"resume_checkpoint_path: {json.dumps(str(root))}", text)
    text = re.sub("batch_accumulation_per_replica: .*", f"batch_accumulation_per_replica: {max(1, BATCH // dp)}", text)
    text = re.sub("accumulate_grad_in_fp32: .*", f"accumulate_grad_in_fp32: {json.dumps(masters)}", text)
    (root / "config.yaml").write_text(text.replace("zero_stage: 0", f"zero_stage: {zero}"))


def load(path):
    """The values of a .pt file, with arrays that may be changed in the place of tensors."""
    file, content = read_torch_file(path.parent, path.name), path.read_bytes()
    bases = {}
    for storage, member in file.records.items():
        raw = np.frombuffer(content[member.begin:member.begin + member.nbytes], np.uint8).copy()
        bases[storage] = raw

    def array(tensor):
        kind = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
        base = bases[tensor.storage].view(kind)
        view = base[tensor.offset:tensor.offset + tensor.num_elements].reshape(tensor.shape)
        return view if tensor.requires_grad else view.copy()

    return _mapped(file.contents, TensorReference, array)


def save(path, contents):
    """Write a .pt file of values with arrays among them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storages, bases = {}, {}

    def reference(array):
        base, dtype = array if array.base is None else array.base, DTYPES[array.dtype.name]
        if id(base) not in storages:
            storages[id(base)], bases[id(base)] = new_storage(dtype, base.nbytes // array.itemsize), base
        offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return new_tensor(dtype, array.shape, storages[id(base)], offset // array.itemsize, array.base is not None)

    file = plan_torch_file(_mapped(contents, np.ndarray, reference), folder_of(str(path)))
    data = {id(storage): bases[key].tobytes() for key, storage in storages.items()}
    path.write_bytes(b"".join(stream(file, lambda storage: [data[id(storage)]])))


def edit(path, change):
    """Change the values of a .pt file, in place: `change` is told them."""
    change(contents := load(path))
    save(path, contents)


def _mapped(value, kind, function):
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    return type(value)(_mapped(item, kind, function) for item in value) if isinstance(value, (list, tuple)) else value
