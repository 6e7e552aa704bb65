"""A Nanotron checkpoint to be written: rank files, and the documents that Nanotron's trainer reads."""
from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stream_reshard.errors import Problems, SourceError, UsageError, quoted, shell_word
from stream_reshard.formats.base import Described, NextStep, Source, Target, with_router_dtype
from stream_reshard.formats.layout import Group
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME, ids_written
from stream_reshard.formats.nanotron.documents import documents
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.rules import NanotronRules, topology_problems
from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.machine.memory import human
from stream_reshard.model.parameters import TOKEN_IDS, Model
from stream_reshard.options import Options

RELEASE_04_ROPE_THETA = 10000.0
"""The only rope_theta of release 0.4."""


@dataclass(frozen=True)
class ToNanotron(Target[NanotronLayout]):
    """Rank files of one topology."""

    marker = MODEL_CONFIG_NAME
    train_at: ClassVar[str] = "in a clone of Nanotron, once config.yaml names your dataset:"
    """The place of the command that trains."""
    rules: NanotronRules

    @classmethod
    def chosen(cls, options: Options, source: Described) -> ToNanotron:
        """The target that the options choose for this source. Raises Refused."""
        family, problems = source.family, Problems()
        is_release_04 = options.checkpoint_version == "1.2"
        kept = None if is_release_04 else source.config_class
        name = (kept or family.nanotron_configs[0]) if options.nanotron_config == "auto" else options.nanotron_config
        if name not in family.nanotron_configs:
            problems.append(UsageError(f"--nanotron-config {name} cannot express {family.name} (it has no attention "
                                       f"biases); use {' or '.join(family.nanotron_configs)}"))
        if is_release_04:
            if name != "LlamaConfig":
                problems.append(UsageError(f"--checkpoint-version 1.2: release 0.4 has no {name}; use 1.5"))
            if options.rope == "neox":
                problems.append(UsageError("--rope neox with --checkpoint-version 1.2: release 0.4 always interleaves "
                                           "RoPE; use interleaved or auto"))
        problems.raise_if_any()
        by_default = is_release_04 or source.rope_interleaved
        interleaved = by_default if options.rope == "auto" else options.rope == "interleaved"
        return cls(NanotronRules(options.topology, name, options.checkpoint_version, interleaved,
                                 options.vocab_multiple))

    def unsupported(self, source: Described) -> Iterator[Unsupported]:
        yield from source.unsupported
        theta = source.config.rope_theta
        if self.rules.version == "1.2" and theta != RELEASE_04_ROPE_THETA:
            yield Unsupported("rope_theta", f"rope_theta is {theta:g}; release 0.4, which reads format 1.2, only has "
                                            f"{RELEASE_04_ROPE_THETA:g}; use --checkpoint-version 1.5", theta)

    def notes(self, source: Source, layout: NanotronLayout) -> Iterator[str]:
        """Remarks on token ids that Nanotron's config cannot hold."""
        written = ids_written(source.config)
        for key in TOKEN_IDS:
            ids = getattr(source.config, key)
            if key == "pad_token_id" and ids is not None:
                yield (f"{key} is {ids}: Nanotron would not train that row of any rank's embedding, or not start; "
                       f"null is written, and the manifest keeps {ids} for --to hf")
            elif ids != written[key]:
                yield (f"{key} is {json.dumps(ids)}: Nanotron's config holds one number, {written[key]} is written; "
                       f"the manifest keeps {json.dumps(ids)} for --to hf")

    def problems(self, model: Model) -> Problems:
        return topology_problems(model, self.rules)

    def layout(self, root: Path, model: Model, dtypes: Callable[[int], str]) -> NanotronLayout:
        layout = NanotronLayout(root, model, self.rules, with_router_dtype(model, dtypes, "F32"))
        for group in layout.groups():
            for number in group.numbers[1:]:
                if (dtype := layout.dtypes(number)) != (first := layout.dtypes(group.numbers[0])):
                    raise SourceError(f"{model.parameter(number).hugging_face} is {dtype}, but Nanotron keeps it in "
                                      f"one tensor with {first} weights; choose one dtype with --dtype")
        return layout

    def documents(self, source: Source, layout: NanotronLayout, dtype: str, destination: Path,
                  companions: Iterable[str]) -> dict[str, bytes]:
        has_tokenizer = any(name.startswith("tokenizer") for name in companions)
        return documents(source.config, self.rules, source.family.has_attention_bias, dtype, destination, has_tokenizer)

    def facts(self, layout: NanotronLayout) -> dict[str, Any]:
        return layout.facts | {"dp": self.rules.topology.dp, "stages": _stage_table(layout)}

    def lines(self, layout: NanotronLayout, facts: Mapping[str, Any]) -> Iterator[str]:
        yield "stage    blocks                                             files       bytes"
        for row in facts["stages"]:
            yield f"{row['stage']:<8} {blocks_text(row['blocks']):<48} {row['files']:>7} {human(row['nbytes']):>11}"

    def __str__(self) -> str:
        rope = "interleaved" if self.rules.rope_interleaved else "as in Hugging Face"
        return f"{self.rules.config_class}, format {self.rules.version}, {self.rules.topology}, RoPE {rope}"

    def next_step(self, destination: Path) -> NextStep:
        """The command that trains from the folder."""
        return NextStep("train", self.train_at,
                        f"CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc_per_node={self.rules.topology.world_size} "
                        f"run_train.py --config-file {shell_word(destination / 'config.yaml')}")


def _stage_table(layout: NanotronLayout) -> list[dict[str, Any]]:
    """Per stage: its blocks, and the files and bytes of all its ranks."""
    stages = layout.all_stages
    rows: list[dict[str, Any]] = [{"stage": stage, "blocks": [b for b, s in stages.items() if s == stage], "files": 0,
                                   "nbytes": 0} for stage in range(layout.rules.topology.pp)]
    examples: dict[Any, Group] = {}
    counts: Counter[tuple[int, Any]] = Counter()
    for group in layout.groups():
        examples.setdefault(group.storage_class, group)
        counts[layout.stage_of(group), group.storage_class] += 1
    for (stage, storage_class), count in counts.items():
        ranks = layout.ranks_of(examples[storage_class])
        rows[stage]["files"] += count * len(ranks)
        rows[stage]["nbytes"] += count * sum(rank.nbytes for rank in ranks)
    return rows


def blocks_text(names: Iterable[str]) -> str:
    """The names of pipeline blocks for a person: `embedding, layers 0-16, final norm, head`."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kind, _, index = name.partition(".")
        grouped[kind].append(index)
    words = {"token_position_embeddings": "embedding", "final_layer_norm": "final norm", "lm_head": "head"}
    return ", ".join(f"layers {indices[0]}-{indices[-1]}" if kind == "decoder" else words.get(kind, quoted(kind))
                     for kind, indices in grouped.items())
