"""A Nanotron checkpoint to be written with the state of its training."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, UsageError, quoted
from stream_reshard.formats.base import Source
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.rules import PADDING, NanotronRules
from stream_reshard.formats.nanotron.source import NanotronSource
from stream_reshard.formats.nanotron.target import ToNanotron
from stream_reshard.formats.nanotron.training.documents import (
    TrainingDocuments, optimizer_config, read_training_documents)
from stream_reshard.formats.nanotron.training.files import (
    OPTIMIZER_CONFIG_NAME, SINGLE_SCHEDULER_NAME, StateRank, random_path, scheduler_path, state_ranks)
from stream_reshard.formats.nanotron.training.fitness import batch_fault, fitness_notes, fitness_problems
from stream_reshard.formats.nanotron.training.layout import MASTERS
from stream_reshard.formats.nanotron.training.schedule import (
    check_schedules, exact_group, exact_schedule, moved_schedule, rates_of, saved_group, saved_schedule, schedule_of)
from stream_reshard.formats.nanotron.training.source import TrainingState, open_state
from stream_reshard.formats.nanotron.training.target import NewTrainingState
from stream_reshard.machine.memory import counted, human
from stream_reshard.model.parameters import Model
from stream_reshard.options import Options
from stream_reshard.options.conversion import flags_of
from stream_reshard.report import wrapped
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.identity import Identity
from stream_reshard.storage.torch_file import MAX_PICKLE_NBYTES
from stream_reshard.storage.torch_writer import folder_of, plan_torch_file, stream

_DECIDED = ("rope", "nanotron_config", "checkpoint_version", "vocab_multiple", "dtype")
"""Options that a training has decided."""


@dataclass(frozen=True)
class WithTraining(ToNanotron):
    """Rank files of one topology, and the state of the training beside them."""

    train_at = "in a clone of Nanotron:"
    original: TrainingState
    source: NanotronSource
    """The source, with the rows of the embedding that go along."""
    papers: TrainingDocuments
    """The documents of the source."""
    zero: int
    """Stage of ZeRO."""
    schedule: str
    """"saved" or "exact"."""
    _made: list[NewTrainingState] = field(default_factory=list, repr=False, compare=False)
    """The state to be written, once it was asked for."""

    @classmethod
    def moved(cls, options: Options, source: NanotronSource, max_nbytes: int) -> WithTraining:
        """The target that the options choose for a source with a training state, whose files are read, each of at most
        `max_nbytes`. Raises Refused, SourceError or ResourceError."""
        problems = Problems()
        for flag in flags_of(options, _DECIDED):
            problems.append(UsageError(f"{flag} with a training state: the training has decided that; --weights-only "
                                       f"moves the weights alone"))
        if options.zero is not None and options.zero > 1:
            problems.append(UsageError(f"--zero {options.zero}: Nanotron has the stages 0 and 1"))
        papers = problems.collect(read_training_documents, source.root, max_nbytes)
        if papers:
            source, rules = _with_rows(options, source, papers, problems)
        state = problems.collect(open_state, source.root, source.layout, min(max_nbytes, MAX_PICKLE_NBYTES))
        if papers:
            problems.extend(fitness_problems(papers, options.topology, options.allow))
        if state and papers:
            state = problems.collect(_with_schedule, state, options.schedule, papers.num_steps)
        state, papers = problems.required(state), problems.required(papers)
        zero = state.zero if options.zero is None else options.zero
        return cls(rules, state, source, papers, zero, options.schedule)

    def taken(self, source: Source) -> Source:
        return self.source

    def layout(self, root: Path, model: Model, dtypes: Any) -> NanotronLayout:
        """The weights as they are: a training has decided their dtypes."""
        return NanotronLayout(root, model, self.rules, dtypes)

    def state(self, layout: NanotronLayout) -> NewTrainingState:
        """Made once: layouts of one model differ in the places of weights alone, on which no state depends."""
        if not self._made or self._made[0].weights.model is not layout.model:
            self._made[:] = [NewTrainingState(self.original, layout, self.rules.topology, self.zero)]
        return self._made[0]

    def accepted_differences(self, layout: NanotronLayout) -> Iterator[str]:
        if self.rules.pad_row is not None:
            yield PADDING

    def identities(self) -> Mapping[str, Identity]:
        return self.original.identities

    def copied(self) -> dict[str, Path]:
        """The random states of the same coordinates, else those of the first rank of all."""
        found, topology = self.original.random, self.rules.topology
        root, first = self.original.layout.root, self.original.random.get(StateRank(0, 0, 0))
        return {random_path(rank.tp, rank.dp or 0, rank.pp, topology): root / path
                for rank in state_ranks(topology, 1) if (path := found.get(rank, first))}

    def documents(self, source: Source, layout: NanotronLayout, dtype: str, destination: Path,
                  companions: Iterable[str]) -> dict[str, bytes]:
        rows = self.rules.padded_vocab(source.config.vocab_size)
        state = self.state(layout)
        shapes = [(name, state.layout.shape_of(position)) for name, position in zip(state.names[0],
                                                                                   state.layout.stages[0])]
        has_masters = MASTERS in state.layout.kinds
        papers = self.papers.moved(self.rules.topology, self.zero, rows, self.rules.vocab_multiple, destination)
        papers[OPTIMIZER_CONFIG_NAME] = optimizer_config(self.rules.topology, self.zero, has_masters, shapes)
        return papers | self._schedules(state)

    def _schedules(self, state: NewTrainingState) -> dict[str, bytes]:
        """The files of the schedule, by path; the ranks of a stage have the same."""
        original, topology, found = self.original, self.rules.topology, {}
        schedules = moved_schedule(original.schedules, original.groups_of(original.names),
                                   original.groups_of(state.names))
        is_single = original.schedules[0].path == SINGLE_SCHEDULER_NAME
        for stage, contents in enumerate(schedules[:1] if is_single else schedules):
            for tp in range(1 if is_single else topology.tp):
                path = SINGLE_SCHEDULER_NAME if is_single else scheduler_path(stage, tp, topology)
                found[path] = b"".join(stream(plan_torch_file(contents, folder_of(path)), lambda storage: ()))
        return found

    def notes(self, source: Source, layout: NanotronLayout) -> Iterator[str]:
        rows, before = self.rules.padded_vocab(source.config.vocab_size), self.original.layout.weights.rules.vocab_rows
        yield from fitness_notes(self.papers, rows)
        if fault := batch_fault(self.papers, self.rules.topology):
            yield f"accepted: {fault}"
        if before is not None and rows > before and self.rules.pad_row is not None:
            yield (f"the embedding gets {rows - before} rows after {before}, copies of the trained row of padding "
                   f"{self.rules.pad_row} with its states: they disturb the loss least")
        elif before is not None and rows > before:
            yield (f"the embedding gets {rows - before} rows of zeros after {before}: each has the logit 0 until it is "
                   f"trained, which raises the loss at first, by about ln({rows} / {before}) = "
                   f"{math.log(rows / before):.4f} where all tokens are equally likely, by less in a trained model")
        elif before is not None and rows < before:
            yield f"the embedding loses its last {before - rows} rows of padding, with their states"
        if self.original.random:
            yield ("random states are copied, not read: those of the same rank, else of the first one; Nanotron does "
                   "not load them")

    def facts(self, layout: NanotronLayout) -> dict[str, Any]:
        new = self.state(layout)
        state, words = new.layout, {kind: "masters" if kind == MASTERS else kind for kind in new.layout.kinds}
        nbytes = {words[kind]: nbytes for kind, nbytes in new.nbytes_by_kind.items()}
        dtypes = {words[kind]: sorted({TORCH_DTYPES.get(names[index], names[index]) for names in state.dtypes.values()})
                  for index, kind in enumerate(state.kinds)}
        return super().facts(layout) | {"training_state": {
            "step": self.papers.num_steps, "zero": self.zero, "schedule": self.schedule, "nbytes_by_kind": nbytes,
            "dtypes": dtypes, "num_files": state.num_files, "nbytes": state.nbytes}}

    def lines(self, layout: NanotronLayout, facts: Mapping[str, Any]) -> Iterator[str]:
        yield from super().lines(layout, facts)
        own = facts["target"]["training_state"]
        yield (f"state    step {own['step']}, ZeRO {own['zero']}, schedule {own['schedule']}, "
               f"{human(own['nbytes'])} in {counted(own['num_files'], 'file')}")
        yield from wrapped(", ".join(f"{kind} {'/'.join(own['dtypes'][kind])} {human(nbytes)}"
                                     for kind, nbytes in own["nbytes_by_kind"].items()))

    def held_nbytes(self, layout: NanotronLayout) -> int:
        """The CRC-32 of each state, with its place at the end of a run."""
        state, topology = self.original.layout, self.rules.topology
        return 16 * len(state.kinds) * state.num_groups * topology.tp * (topology.dp if self.zero else 1)


def _with_rows(options: Options, source: NanotronSource, papers: TrainingDocuments, problems: Problems
               ) -> tuple[NanotronSource, NanotronRules]:
    """(source with the rows of the embedding that go along, rules of the target). Rows of padding are state: all of
    them stay where TP can split them, unless the user gives the size without padding."""
    rows, size, multiple = source.config.vocab_size, options.vocab_size, papers.vocab_multiple
    recorded = source.recorded_vocab_size
    if size is not None and not 0 < size <= rows:
        problems.append(UsageError(f"--vocab-size {size}: the embedding has {rows} rows"))
    elif None not in (size, recorded) and size != recorded:
        problems.append(UsageError(f"--vocab-size {size}: the manifest of {quoted(source.root)} has {recorded}"))
    if size is None and rows % options.tp == 0:  # Nanotron need not pad again.
        multiple = math.gcd(multiple, rows // options.tp)
    rules = replace(source.layout.rules, topology=options.topology, vocab_rows=None, vocab_multiple=multiple)
    rules = replace(rules, vocab_rows=rules.padded_vocab(rows if size is None else size))
    has_pad_row = (size or recorded or rows) < rows < (rules.vocab_rows or rows)
    return (source.with_rows(min(rows, rules.vocab_rows or rows)),
            replace(rules, pad_row=rows - 1 if has_pad_row else None))


def _with_schedule(state: TrainingState, kind: str, num_steps: int) -> TrainingState:
    """A state with this kind of schedule, "saved" or "exact", whichever it has. Raises SourceError."""
    files, names = state.schedules, state.groups_of(state.names)
    check_schedules(files, names)
    groups = {name: entry.group for name, entry in state.entries.items()}
    if schedule_of(files[0].contents, map(groups.__getitem__, state.names[0]), num_steps) == kind:
        return state
    if kind == "exact":
        where, changed = quoted(str(state.layout.root / "optimizer")), exact_schedule
        groups = {name: exact_group(group, where) for name, group in groups.items()}
    else:
        rates, changed = rates_of(files, names), saved_schedule
        groups = {name: saved_group(group, rates["" if state.has_one_group else name])
                  for name, group in groups.items()}
    return replace(state, entries={name: replace(entry, group=groups[name]) for name, entry in state.entries.items()},
                   schedules=tuple(replace(file, contents=changed(file.contents)) for file in files))
