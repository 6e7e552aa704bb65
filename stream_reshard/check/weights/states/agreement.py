"""Agreement of two training states in everything but tensors."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from stream_reshard.check.weights.nanotron import MAX_LISTED
from stream_reshard.check.weights.states.metadata import sum_faults
from stream_reshard.check.weights.states.names import word
from stream_reshard.check.weights.states.rank_file import PREFIX
from stream_reshard.check.weights.states.state import TrainingState
from stream_reshard.errors import DifferenceError, Problems, quoted
from stream_reshard.formats.nanotron.config import METADATA_NAME
from stream_reshard.storage.torch_bytes import sums_in

_OF_SCHEDULE = {"lr", "last_epoch"}
"""What a schedule that is written exactly has otherwise than one as Nanotron saves it."""

EXACT = ("the schedule is written so that Nanotron goes on exactly where it stopped (lr is initial_lr, last_epoch is "
         "one less)")


def state_differences(source: TrainingState, copy: TrainingState) -> Iterator[DifferenceError]:
    """An error for each difference; of one kind the first MAX_LISTED."""
    ignored = _OF_SCHEDULE if _is_other_kind(source, copy) else set()
    if source.kinds != copy.kinds:
        yield DifferenceError(f"the optimizer in {quoted(copy.root)} keeps {', '.join(copy.kinds)}, in the source "
                              f"{', '.join(source.kinds)}")
    if source.step != copy.step:
        yield DifferenceError(f"the optimizer in {quoted(copy.root)} has done {copy.step} steps, in the source "
                              f"{source.step}")
    for differences in (_dtype_differences(source, copy), _group_differences(source, copy, ignored),
                        _schedule_differences(source, copy, ignored),
                        _meta_differences(source, copy), _random_differences(source, copy)):
        yield from islice(differences, MAX_LISTED)
        if num_more := sum(1 for _ in differences):
            yield DifferenceError(f"and {num_more} more of the settings of the training differ")


def _is_other_kind(source: TrainingState, copy: TrainingState) -> bool:
    """True if one of two equal schedules is written exactly, and the other as Nanotron saves it."""
    steps = [state.schedule.last_epoch + state.is_exact for state in (source, copy)]
    return source.is_exact != copy.is_exact and steps[0] == steps[1]


def _compared(place: str, copy: Mapping[str, Any], source: Mapping[str, Any], ignored: Collection[str] = ()
              ) -> Iterator[DifferenceError]:
    """An error for each key whose values differ; texts tell True from 1, and a tuple from a list."""
    for key in {**source, **copy}:
        if key in ignored:
            continue
        texts = [repr(side[key]) if key in side else "not there" for side in (copy, source)]
        if texts[0] != texts[1]:
            yield DifferenceError(f"{place}: {word(key)} is {quoted(texts[0])}, in the source {quoted(texts[1])}")


def _dtype_differences(source: TrainingState, copy: TrainingState) -> Iterator[DifferenceError]:
    """An error for each kind of state that is kept in another dtype; such states are not compared."""
    for kind in copy.kinds:
        if kind not in source.kinds:
            continue
        pairs = [(name, source.dtype_of(kind, name), copy.dtype_of(kind, name)) for name in copy.stages_of
                 if name in source.stages_of]
        if others := [pair for pair in pairs if pair[1] != pair[2]]:
            name, in_source, in_copy = others[0]
            yield DifferenceError(f"{kind} of {quoted(PREFIX + name)} has the dtype {in_copy} in {quoted(copy.root)}, "
                                  f"{in_source} in the source ({len(others)} of {len(pairs)} parameters)")


def _group_differences(source: TrainingState, copy: TrainingState, ignored: set[str]) -> Iterator[DifferenceError]:
    known = {(name, index): settings for name, index, settings in source.groups()}
    for name, index, settings in copy.groups():
        # A model on one stage has a tied embedding once: the copy on the stage of the head is like it.
        other = known.get((name, index), known.get((name, 0)))
        if other is not None and other is not settings:
            yield from _compared(f"param_groups of {quoted(PREFIX + name)}", settings, other, ignored)


def _schedule_differences(source: TrainingState, copy: TrainingState, ignored: set[str]) -> Iterator[DifferenceError]:
    yield from _compared("the schedule", copy.schedule.numbers, source.schedule.numbers, ignored)
    known = dict(_named_entries(source))
    for (name, index), entries in _named_entries(copy):
        other = known.get((name, index), known.get((name, 0)))
        if other is not None:  # Format 1.2 keeps those of the first stage only.
            yield from _compared(f"the schedule of {quoted(PREFIX + name)}", entries, other)


def _named_entries(state: TrainingState) -> Iterator[tuple[tuple[str, int], Mapping[str, Any]]]:
    for (stage, index), entries in state.schedule.entries.items():
        name = state.stages[stage][index]
        yield (name, state.stages_of[name].index(stage)), entries


def _meta_differences(source: TrainingState, copy: TrainingState) -> Iterator[DifferenceError]:
    """Format versions keep different numbers; of two versions those are compared that both keep."""
    is_same = source.document.get("version") == copy.document.get("version")
    ignored = set() if is_same else {*source.metas} ^ {*copy.metas}
    if not is_same:
        ignored |= {"data_stages"}
    yield from _compared(METADATA_NAME, copy.metas, source.metas, ignored)


def _random_differences(source: TrainingState, copy: TrainingState) -> Iterator[DifferenceError]:
    """An error for each state of random generators that no rank of the source has; which rank has it is no matter."""
    known = {Problems().collect(sums_in, source.root, path) for path in source.random_paths}
    for path in copy.random_paths if known else ():
        faults = Problems()
        if faults.collect(sums_in, copy.root, path) not in known:
            yield DifferenceError(str(faults[0]) if faults else f"{quoted(path)} holds a state of the random "
                                  f"generators that no rank of the source has")


def state_notes(source: TrainingState, copy: TrainingState) -> Iterator[str]:
    """Remarks on what is meant to differ."""
    if _is_other_kind(source, copy):
        yield f"{quoted((copy if copy.is_exact else source).root)}: {EXACT}"


def sum_differences(source: TrainingState | None, copy: TrainingState, notes: list[str]) -> Iterator[DifferenceError]:
    """An error for each sum of samples or tokens that does not add up in the copy alone; a remark where the source has
    it like that."""
    faults = list(sum_faults(copy.metas))
    if source is not None and source.metas == copy.metas:
        notes.extend(faults)
    else:
        yield from map(DifferenceError, faults)
