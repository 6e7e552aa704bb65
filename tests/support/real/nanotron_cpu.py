"""Nanotron's own process groups, model config and model, on the CPU. Importing this puts the stand-ins in place."""
import dataclasses
import json
import os

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Nanotron asserts it
import stand_ins  # noqa: E402

stand_ins.install()

import nanotron.config  # noqa: E402
import nanotron.distributed  # noqa: E402
import torch  # noqa: E402
from nanotron.models import build_model  # noqa: E402
from nanotron.models.llama import LlamaForTraining  # noqa: E402
from nanotron.parallel import ParallelContext  # noqa: E402
from nanotron.trainer import mark_tied_parameters  # noqa: E402

ALWAYS_INTERLEAVED = "rope_interleaved" not in {field.name for field in dataclasses.fields(nanotron.config.LlamaConfig)}


def start_gloo():
    """Takes the place of Nanotron's initialize_torch_distributed, which knows NCCL only."""
    torch.distributed.init_process_group("gloo")
    return True


nanotron.distributed.initialize_torch_distributed = start_gloo


def tell(result):
    """Rank 0 prints the result. No rank goes on before, because a rank that exits with an error ends the others."""
    if int(os.environ["RANK"]) == 0:
        print("\nRESULT " + json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def from_all_ranks(value):
    values = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(values, value)
    return values


def model_class(config):
    if type(config).__name__ == "Qwen2Config":
        from nanotron.models.qwen import Qwen2ForTraining
        return Qwen2ForTraining
    return LlamaForTraining


def config_from_fields(class_name, fields):
    """A model config of Nanotron's; fields that this release does not know are left out."""
    cls = getattr(nanotron.config, class_name)
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in fields.items() if name in known})


def config_from_folder(folder):
    """The folder's model_config.json as Nanotron reads it: a key it does not know is an error."""
    fields = json.loads((folder / "model_config.json").read_text())
    class_name = "Qwen2Config" if fields.get("is_qwen2_config") else "LlamaConfig"
    return getattr(nanotron.config, class_name)(**fields)


def rope_interleaved(config):
    """Whether this Nanotron turns neighbouring pairs for this config; release 0.4 always does."""
    return getattr(config, "rope_interleaved", True)


def build(config, tp, pp, dp, dtype):
    """The model as Nanotron's trainer builds it, and its process groups; all parameters are NaN."""
    context = ParallelContext(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)
    parallelism = nanotron.config.ParallelismArgs(dp=dp, pp=pp, tp=tp)
    cls = model_class(config)
    model = build_model(
        model_builder=lambda: cls(config=config, parallel_context=context, parallel_config=parallelism,
                                  random_states=None),
        parallel_context=context, dtype=dtype, device=torch.device("cpu"))
    mark_tied_parameters(model=model, parallel_context=context, parallel_config=parallelism)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(float("nan"))
    return model, context


def sharded_logits(model, input_ids):
    """Logits of the training forward, as this rank has them: (batch, sequence, its part of the vocabulary)."""
    if model_class(model.config) is LlamaForTraining:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        return model.model(input_ids=input_ids, input_mask=mask).transpose(0, 1)
    batch, length = input_ids.shape
    return model.model(input_ids=input_ids, position_ids=torch.arange(length).repeat(batch, 1))


def unmoved_rows(model, vocab_size):
    """Rows of this rank's embedding that one step of SGD leaves as they are, after a pass over every token."""
    embedding = model.model.token_position_embeddings.pp_block.token_embedding
    weight, before = embedding.weight, embedding.weight.detach().clone()
    ids = torch.arange(vocab_size).unsqueeze(1)  # Each its own sequence.
    model.zero_grad()
    sharded_logits(model, ids).float().square().sum().backward()
    with torch.no_grad():
        weight -= weight.grad
    same = (weight == before).all(dim=1).nonzero().flatten() + embedding.min_id
    return [row for row in same.tolist() if row < vocab_size]


def logits(model, context, input_ids):
    """Float32 logits of the training forward, of all tensor-parallel ranks: (batch, sequence, vocabulary)."""
    batch, length = input_ids.shape
    with torch.no_grad():
        out = sharded_logits(model, input_ids)
    part = out.reshape(batch, length, -1).float().contiguous()
    parts = [torch.empty_like(part) for _ in range(context.tp_pg.size())]
    torch.distributed.all_gather(parts, part, group=context.tp_pg)
    return torch.cat(parts, dim=-1)
