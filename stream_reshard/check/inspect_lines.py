"""The contents of a checkpoint folder, for a person."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stream_reshard.check.inspect_states import state_lines
from stream_reshard.machine.memory import big, counted, human
from stream_reshard.model.truncation import layers_text
from stream_reshard.report import note_lines


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts of `inspect`."""
    if facts["is_unfinished"]:
        yield "state      unfinished: a run was stopped here, and the command that began it goes on"
    versions = ", ".join(facts.get("versions", ()))
    parts = [facts["checkpoint"], facts.get("config_class"), f"format {versions}" if versions else None]
    yield f"checkpoint {', '.join(filter(None, parts))}"
    if facts.get("family"):
        yield from _model_lines(facts)
    yield from _topology_lines(facts)
    dtypes = [f"{dtype} in {counted(number, 'tensor')}" for dtype, number in facts["dtypes"].items()]
    yield "files      " + ", ".join([f"{human(facts['nbytes'])} in {counted(facts['num_files'], 'file')}", *dtypes])
    if "training" in facts:
        yield from state_lines(facts["training"])
    yield f"manifest   {'of a conversion by this tool' if facts['has_manifest'] else 'none'}"
    yield from (f"ignored    {key}: {reason}" for key, reason in facts.get("ignored", {}).items())
    if "num_nan" in facts:
        yield f"values     {facts['num_nan']} NaN, {facts['num_infinite']} infinite"
        yield from (f"           {name}: {nan} NaN, {infinite} infinite"
                    for name, (nan, infinite) in facts["nan_and_infinite"].items())
    yield from (f"fault      {fault}" for fault in facts["faults"])
    if not facts["faults"]:
        yield "faults     none"
    yield from note_lines(facts)


def _model_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    number = facts["num_parameters"]
    yield (f"model      {facts['family']}, {'' if number is None else big(number) + ' parameters, '}"
           f"{layers_text(facts['num_layers'], facts['whole_num_layers'])}, {counted(facts['heads'], 'head')}, "
           f"{counted(facts['kv_heads'], 'KV head')}")
    rows, padded = facts["vocab_size"], facts.get("vocab_size_padded")
    known = "rows without padding are not known" if rows is None else f"{rows} rows"
    padding = f"{', ' if rows is not None else ': '}{padded} with padding" if padded not in (None, rows) else ""
    yield f"vocab      {known}{padding}{', head tied to the embedding' if facts['tied'] else ''}"
    order = {True: ", interleaved", False: ", as in Hugging Face", None: ""}[facts.get("rope_interleaved")]
    skipped = f", none in every {facts['no_rope_layer']}th layer" if facts["no_rope_layer"] else ""
    yield f"rope       base {facts['rope_theta']:g}{order}{skipped}"


def _topology_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    if topologies := facts.get("topologies_tp_pp"):
        yield f"topology   {' and '.join(f'TP={tp} PP={pp}' for tp, pp in topologies)}"
    yield from (f"stage {stage:<4} {blocks}" for stage, blocks in facts.get("stages", {}).items())
