"""A Nanotron checkpoint to be written with the files of another one, the template: that of a random model that Nanotron
saved, for example. Its files get the weights of the source."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.base import Described, Source
from stream_reshard.formats.differences import layout_differences
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.rules import STAGES, padded_size
from stream_reshard.formats.nanotron.source import NanotronSource, open_nanotron
from stream_reshard.formats.nanotron.target import ToNanotron
from stream_reshard.model.architectures import Family
from stream_reshard.model.parameters import TOKEN_IDS, Model, ModelConfig
from stream_reshard.options import Options, nanotron_flags

MAX_LISTED = 100
"""Differences that a plan lists; further ones are counted."""

_MAY_DIFFER = {"family", "vocab_size", "initializer_range", "unsaid_ids", "whole_num_hidden_layers",
              *TOKEN_IDS}
"""Settings in which template and source may differ: they change neither tensors nor forward pass. Family and vocab_size
are checked separately."""


@dataclass(frozen=True)
class LikeTemplate(ToNanotron):
    """Rank files with the names, versions, slices and dtypes of a template."""

    template: NanotronLayout

    @classmethod
    def chosen_like(cls, root: Path, options: Options, source: Described, max_nbytes: int) -> LikeTemplate:
        """Read the headers of the template at `root`, each of at most `max_nbytes`. Raises Refused where it has
        problems, is of another model, or an option contradicts it."""
        problems = Problems(_flag_problems(options))
        opened = open_nanotron(root, max_nbytes, None, problems, is_exact=False)
        if opened is not None:
            problems.extend(_model_problems(root, opened, source.family, source.config))
        template = problems.required(opened if isinstance(opened, NanotronSource) else None)
        rules, vocab_size = template.layout.rules, source.config.vocab_size
        rows = rules.padded_vocab(template.config.vocab_size)
        multiple = next(n for n in range(1, rows + 1) if padded_size(vocab_size, rules.topology.tp * n) == rows)
        return cls(replace(rules, topology=replace(rules.topology, dp=options.topology.dp), vocab_multiple=multiple),
                   template.layout)

    def problems(self, model: Model) -> Problems:
        return Problems()  # The model fits: the template has been cut like this.

    def layout(self, root: Path, model: Model, dtypes: Callable[[int], str]) -> NanotronLayout:
        return NanotronLayout(root, model, self.rules, self.template.dtypes, stages=self.template.stages)

    def notes(self, source: Source, layout: NanotronLayout) -> Iterator[str]:
        """Differences between the template and this tool's own choice, tensor by tensor."""
        yield from super().notes(source, layout)
        own = NanotronLayout(layout.root, layout.model, replace(self.rules, vocab_rows=None, vocab_multiple=1),
                             source.layout.dtype_at)
        differences = layout_differences(own, layout)
        for text in islice(differences, MAX_LISTED):
            yield f"own choice and template differ in {text}"
        if num_more := sum(1 for _ in differences):
            yield f"and {num_more} more; `diff` with a conversion without --template lists all"

    def accepted_differences(self, layout: NanotronLayout) -> Iterator[str]:
        if layout.moved_blocks:
            yield STAGES

    def __str__(self) -> str:
        return f"{super().__str__()}, like {self.template.root}"


def _flag_problems(options: Options) -> Iterator[UsageError]:
    """Options that the template decides."""
    for flag in nanotron_flags(options):
        yield UsageError(f"{flag} with --template: the template decides that")
    if options.to == "hf":
        yield UsageError("--to hf with --template: a template is a Nanotron checkpoint")
    if options.dtype != "keep":
        yield UsageError("--dtype with --template: the template decides that")


def _model_problems(root: Path, template: Described, family: Family, config: ModelConfig) -> Iterator[SourceError]:
    """Settings in which the template is a checkpoint of another model."""
    if template.family.rows != family.rows:
        yield SourceError(f"{quoted(root)} holds a {template.family.name} model, the source is {family.name}")
    for field in fields(ModelConfig):
        template_value, source_value = getattr(template.config, field.name), getattr(config, field.name)
        if template_value != source_value and field.name not in _MAY_DIFFER:
            yield SourceError(f"{quoted(root)}: {field.name} is {quoted(template_value)}, in the source "
                              f"{quoted(source_value)}")
    rows = template.layout.facts["vocab_rows"] if isinstance(template, Source) else config.vocab_size
    if rows < config.vocab_size:
        yield SourceError(f"{quoted(root)}: its embedding has {rows} rows, the source needs {config.vocab_size}")
