"""What a person reads: the plan as a table, the summary of a run; and the same as JSON."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from stream_reshard.convert import Conversion
from stream_reshard.errors import shell_word, shown
from stream_reshard.execute import Done
from stream_reshard.layouts.base import TORCH_DTYPES, Group
from stream_reshard.layouts.nanotron import stages_of
from stream_reshard.memory import human


def stage_table(conversion: Conversion) -> list[dict[str, Any]]:
    """Per stage: the blocks it holds, and the files and bytes of all its ranks."""
    target, format = conversion.target, conversion.format
    stages = stages_of(target.model.config, format)
    rows: list[dict[str, Any]] = [{"stage": stage, "blocks": [b for b, s in stages.items() if s == stage], "files": 0,
                                   "nbytes": 0} for stage in range(format.topology.pp)]
    examples: dict[Any, Group] = {}
    counts: Counter[tuple[int, Any]] = Counter()
    for group in target.groups():
        examples.setdefault(group.kind, group)
        counts[target.stage_of(group), group.kind] += 1
    for (stage, kind), count in counts.items():
        ranks = target.ranks_of(examples[kind])
        rows[stage]["files"] += count * len(ranks)
        rows[stage]["nbytes"] += count * sum(rank.nbytes for rank in ranks)
    return rows


def as_json(conversion: Conversion) -> dict[str, Any]:
    """The plan as one JSON document; sizes in bytes."""
    plan, options, format = conversion.plan, conversion.options, conversion.format
    config, topology = plan.target.model.config, format.topology
    return {
        "source": {"path": str(plan.source.root), "format": plan.source.format, "family": config.family,
                   "num_shards": plan.source.num_files, "nbytes": conversion.source.nbytes},
        "target": {"path": str(options.destination) if options.destination else None, "format": plan.target.format,
                   "version": format.version, "config_class": format.config_class, "tp": topology.tp,
                   "pp": topology.pp, "dp": topology.dp, "rope_interleaved": format.rope_interleaved,
                   "num_files": plan.target.num_files, "nbytes": plan.nbytes, "dtype": conversion.dtype},
        "num_parameters": plan.target.model.num_elements,
        "vocab": {"size": config.vocab_size, "padded": format.padded_vocab(config.vocab_size)},
        "tied": config.tie_word_embeddings, "stages": stage_table(conversion),
        "casts": {f"{TORCH_DTYPES[a]} to {TORCH_DTYPES[b]}": n for (a, b), n in plan.casts.items()},
        "num_jobs": len(plan.jobs), "largest_job_nbytes": plan.largest_job_nbytes,
        "memory": {"allowed": conversion.memory.allowed, "reserved": conversion.memory.reserved,
                   "projected": conversion.memory.projected, "num_workers": conversion.memory.num_workers,
                   "block_nbytes": conversion.memory.block_nbytes},
        "disk_nbytes": conversion.disk_nbytes,
        "disk_free_nbytes": conversion.disk_free, "notes": list(conversion.notes), "plan_sha256": plan.digest}


def plan_lines(conversion: Conversion) -> Iterator[str]:
    """The plan for a person."""
    facts = as_json(conversion)
    source, target, memory = facts["source"], facts["target"], facts["memory"]
    yield (f"source   {shown(source['path'])}  ({source['format']}, {source['family']}, "
           f"{facts['num_parameters'] / 1e6:,.1f} M parameters, {source['num_shards']} shards, "
           f"{human(source['nbytes'])})")
    yield (f"target   {shown(target['path'] or '(not given)')}  ({target['format']} {target['config_class']}, format "
           f"{target['version']}, {conversion.format.topology}, {target['dtype']}, RoPE "
           f"{'interleaved' if target['rope_interleaved'] else 'as in Hugging Face'})")
    yield "stage    blocks                                             files       bytes"
    for row in facts["stages"]:
        yield f"{row['stage']:<8} {_blocks(row['blocks']):<48} {row['files']:>7} {human(row['nbytes']):>11}"
    vocab = facts["vocab"]
    padding = f"padded to {vocab['padded']} with zeros" if vocab["padded"] != vocab["size"] else "no padding"
    yield f"vocab    {vocab['size']} rows, {padding}{', head tied to the embedding' if facts['tied'] else ''}"
    for cast, number in facts["casts"].items():
        yield f"cast     {number} parameters from {cast}"
    yield f"jobs     {facts['num_jobs']}, the largest writes {human(facts['largest_job_nbytes'])}"
    yield (f"memory   reserved {human(memory['reserved'])}, projected {human(memory['projected'])} of "
           f"{human(memory['allowed'])} allowed ({memory['num_workers']} workers)")
    free = f", {human(facts['disk_free_nbytes'])} free" if facts["disk_free_nbytes"] is not None else ""
    yield f"disk     {human(facts['disk_nbytes'])} in {target['num_files']} files{free}"
    yield from (f"note     {note}" for note in facts["notes"])


def _blocks(names: list[str]) -> str:
    """`embedding, layers 0-16, final norm, head`."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kind, _, index = name.partition(".")
        grouped[kind].append(index)
    words = {"token_position_embeddings": "embedding", "final_layer_norm": "final norm", "lm_head": "head"}
    return ", ".join(f"layers {indices[0]}-{indices[-1]}" if kind == "decoder" else words[kind]
                     for kind, indices in grouped.items())


def summary(conversion: Conversion, seconds: float, peak: int, io: Mapping[str, int], done: Done) -> dict[str, Any]:
    """What a finished run did, as JSON; sizes in bytes. `io`: what the kernel counted meanwhile."""
    return as_json(conversion) | {"seconds": round(seconds, 3), "peak_nbytes": peak, "num_files_kept": done.num_kept,
                                  "leftovers": list(map(str, done.leftovers)), "num_digests": done.num_digests,
                                  "nbytes_cloned": done.moved.cloned, "nbytes_copied": done.moved.copied,
                                  "nbytes_strided": done.moved.strided, "io": dict(io),
                                  "verified": conversion.options.verify, "torchrun": torchrun_line(conversion)}


def summary_lines(conversion: Conversion, seconds: float, peak: int, io: Mapping[str, int],
                  done: Done) -> Iterator[str]:
    """What a finished run did, for a person."""
    memory, plan = conversion.memory, conversion.plan
    yield (f"done     {plan.target.num_files} files, {human(plan.nbytes)} in {seconds:.1f} s "
           f"({human(plan.nbytes / max(seconds, 1e-9))}/s), durable in "
           f"{shown(conversion.options.destination)}")
    yield from (f"left     {shown(path)}: the old checkpoint could not be removed" for path in done.leftovers)
    if done.num_kept:
        yield f"resumed  {done.num_kept} files were kept from an earlier attempt, each with the digest in its journal"
    yield _moved_line(conversion, io, done)
    if conversion.options.verify:
        yield "verified every weight, header and file against the source, before the commit: all equal"
    yield (f"memory   peak {human(peak)} measured, {human(memory.projected)} projected, "
           f"{human(memory.allowed)} allowed")
    yield "train    " + torchrun_line(conversion)


def _moved_line(conversion: Conversion, io: Mapping[str, int], done: Done) -> str:
    moved = done.moved
    line = f"moved    {human(moved.cloned)} cloned, {human(moved.copied)} copied, {human(moved.strided)} strided"
    if io:
        line += f"; {human(io['rchar'])} read and {human(io['wchar'])} written by calls"
    num_without = conversion.plan.target.num_files - done.num_kept - done.num_digests
    if num_without > 0:
        line += f"; {num_without} files have no digest" + (
            ", as they share blocks (--digests all reads them)" if moved.cloned else "")
    return line


def done_lines(conversion: Conversion) -> Iterator[str]:
    """What a run says that found its work done."""
    proof = "and equals the source" if conversion.options.verify else "`verify` proves it"
    yield (f"done     {shown(conversion.options.destination)} holds this conversion already, complete; {proof}, "
           f"--overwrite makes it anew")
    yield "train    " + torchrun_line(conversion)


def torchrun_line(conversion: Conversion) -> str:
    """The command that trains from the folder, in a checkout of Nanotron."""
    destination = conversion.options.destination
    assert destination is not None
    return (f"CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc_per_node={conversion.format.topology.world_size} "
            f"run_train.py --config-file {shell_word(destination.resolve() / 'config.yaml')}")
