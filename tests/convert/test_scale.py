"""Plans of models with 405 billion and with a trillion parameters, from headers in sparse files, within 64 MiB.

The trillion is a Llama that is far too deep: as many tensors, shards and bytes as a mixture of experts of that size has.
"""
import json
import math
import random
import subprocess
import sys

import pytest
from running import ROOT, WATCHED
from sources import FAMILY, INDEX, shapes_of

from stream_reshard.convert.conversion import Options, plan_conversion
from stream_reshard.model.box import Box
from stream_reshard.plan.alignment import Alignment
from stream_reshard.plan.proof import Survey

LIMIT = 64 * 2**20
SIZES = {
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
             "num_key_value_heads": 8, "vocab_size": 128256},
    "1T": {"hidden_size": 2048, "intermediate_size": 11776, "num_hidden_layers": 11760, "num_attention_heads": 16,
           "num_key_value_heads": 8, "vocab_size": 128256}}
SHARD_NBYTES = 5 * 10**9


def write_sparse_shards(root, config):
    """The headers of a checkpoint in bfloat16, in files of the right size that take no disk, and its index; returns the
    shape, shard and first byte of every tensor."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(FAMILY["llama"] | config))
    shards, size = [{}], 0
    for key, shape in shapes_of("llama", config, tied=False).items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD_NBYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    found, places = {}, {}
    for i, table in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}} | table).encode()
        text += b" " * (-len(text) % 8)
        with open(root / name, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in table.values()))
        found |= dict.fromkeys(table, name)
        places |= {key: (entry["shape"], name, 8 + len(text) + entry["data_offsets"][0])
                   for key, entry in table.items()}
    total = sum(2 * math.prod(shape) for shape, *_ in places.values())
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": found}, indent=2))
    return places


@pytest.fixture(scope="module", params=["405B", pytest.param("1T", marks=pytest.mark.heavy)])
def sparse(request, tmp_path_factory):
    """(folder, config, places) of one of the models."""
    root = tmp_path_factory.mktemp("sparse") / "hf"
    config = SIZES[request.param]
    return root, config, write_sparse_shards(root, config)


@pytest.fixture(scope="module")
def plan(sparse):
    """Its plan on 32 ranks."""
    return plan_conversion(Options(sparse[0], None, tp=8, pp=4, max_memory=2**33)).plan


def test_plan_in_64_mib(sparse):
    root, config, places = sparse
    command = [sys.executable, "-c", WATCHED, "plan", str(root), "--tp", "8", "--pp", "4", "--json", "--max-memory",
               "64MiB"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *lines, peak = run.stderr.splitlines()
    assert (run.returncode, lines) == (0, [])
    assert int(peak) < LIMIT, f"{int(peak) / 2**20:.1f} MiB"
    facts, layers = json.loads(run.stdout), config["num_hidden_layers"]
    num_elements = sum(math.prod(shape) for shape, *_ in places.values())
    assert facts["num_parameters"] == num_elements and facts["num_jobs"] == 3 + 6 * layers
    assert facts["source"]["num_shards"] == len({name for _, name, _ in places.values()})
    assert facts["source"]["nbytes"] == sum(path.stat().st_size for path in root.glob("*.safetensors"))
    assert facts["target"]["num_files"] == 8 + 1 + 8 + layers * (2 + 4 * 8)
    headers = facts["target"]["nbytes"] - 2 * num_elements
    assert 100 * facts["target"]["num_files"] < headers < (500 + 4096) * facts["target"]["num_files"]
    assert sum(row["files"] for row in facts["stages"]) == facts["target"]["num_files"]
    assert sum(row["nbytes"] for row in facts["stages"]) == 2 * num_elements
    assert sum(len(row["blocks"]) for row in facts["stages"]) == layers + 3
    assert facts["memory"]["projected"] <= LIMIT
    # A run keeps a record per file; a plan without a destination only says so.
    assert any("for the records of" in note for note in facts["notes"]) == (layers > 1000)


FFN, ATTENTION = ("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PARTS = {"attention.q": ("attn/qkv_proj", ATTENTION, 0, 0), "attention.k": ("attn/qkv_proj", ATTENTION, 1, 0),
         "attention.v": ("attn/qkv_proj", ATTENTION, 2, 0), "mlp.gate": ("mlp/gate_up_proj", FFN, 0, 0),
         "mlp.up": ("mlp/gate_up_proj", FFN, 1, 0), "attention.o": ("attn/o_proj", ("self_attn.o_proj",), 0, 1),
         "mlp.down": ("mlp/down_proj", ("mlp.down_proj",), 0, 1),
         "mlp_norm": ("post_attention_layernorm", ("post_attention_layernorm",), 0, None),
         "attention_norm": ("input_layernorm", ("input_layernorm",), 0, None)}
"""Per parameter of a layer, by hand: folder in Nanotron, what is fused there, which of it it is, the dim that is split."""


def expected(layer, part, row, column, places, num_tp):
    """(shard, byte, rank or None, element of the rank's tensor, folder) of one weight, by hand."""
    folder, fused, own, dim = PARTS[part]
    shapes = [places[f"model.layers.{layer}.{name}.weight"][0] for name in fused]
    _, shard, begin = places[f"model.layers.{layer}.{fused[own]}.weight"]
    shape = (*shapes[own], 1)[:2]
    byte = begin + 2 * (row * shape[1] + column)
    if dim is None:
        return shard, byte, None, row, folder
    size = shape[dim] // num_tp
    rank, inside = divmod((row, column)[dim], size)
    if dim == 1:
        return shard, byte, rank, row * size + inside, folder
    above = sum(rows // num_tp for rows, _ in shapes[:own])
    return shard, byte, rank, (above + inside) * shape[1] + column, folder


def test_weights_of_random_layers_stand_where_they_should(sparse, plan):
    """What a plan derives for a layer is what its place in the source and Nanotron's rules say, weight by weight."""
    _, config, places = sparse
    rng = random.Random(5)
    for layer in [0, *rng.sample(range(1, config["num_hidden_layers"]), 3), config["num_hidden_layers"] - 1]:
        for part in PARTS:
            name = f"layers.{layer}.{part}"
            parameter = plan.source.model.parameter(plan.source.model.number_of(name))
            for _ in range(20):
                flat = rng.randrange(parameter.num_elements)
                row, column = divmod(flat, (*parameter.matrix_shape, 1)[1])
                shard, byte, rank, element, folder = expected(layer, part, row, column, places, 8)
                point = []
                for extent in reversed(parameter.shape):
                    flat, index = divmod(flat, extent)
                    point.insert(0, index)
                box = Box(tuple(point), tuple(n + 1 for n in point))
                (source,), (target,) = ([held for held in layout.slices[name] if held.region.contains(box)]
                                        for layout in (plan.source, plan.target))
                assert (source.tensor.file, source.tensor.begin + 2 * source.offset_of(box)) == (shard, byte), name
                assert target.offset_of(box) == element, name
                assert f"decoder/{layer}/pp_block/{folder}/" in target.tensor.file
                assert rank is None or f"tp-rank-{rank}-of-8" in target.tensor.file


def test_jobs_read_the_source_from_its_begin_to_its_end(plan):
    """In the order of jobs the lowest byte that each reads never goes back; each job is derived on its own."""
    rng, last = random.Random(6), ("", 0)
    for i in sorted(rng.sample(range(len(plan.jobs)), 200)):
        job = plan.jobs[i]
        lowest = min((held.tensor.file, held.tensor.begin)
                     for name in job.parameters for held in plan.source.slices[name])
        assert lowest > last
        last = lowest
        assert {held.tensor.file for name in job.parameters for held in plan.target.slices[name]} == {
            file.path for file in job.files}
    assert sum(1 for _ in plan.target.paths) == plan.target.num_files
    assert not Survey(Alignment(plan.source, plan.target), plan.target).faults
