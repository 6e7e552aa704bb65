"""Two folders of which both, one or none have a training state: what is compared, and what that proves."""
from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.scope import STATES
from stream_reshard.check.weights.side import Side
from stream_reshard.check.weights.states.agreement import state_differences, state_notes, sum_differences
from stream_reshard.check.weights.states.moved import StateWeights
from stream_reshard.check.weights.states.names import OPTIMIZER
from stream_reshard.check.weights.states.rank_file import MASTERS
from stream_reshard.check.weights.states.state import has_state, open_state
from stream_reshard.errors import DifferenceError, Problems, quoted


def with_states(source: Checkpoint, copy_side: Side, allow: Collection[str], max_nbytes: int,
                problems: Problems) -> tuple[Checkpoint, Side]:
    """Both folders with their training states opened, if the copy has one; faults of the copy's go to `problems`. That
    of the source is opened for a comparison only: weights alone can be verified where a part of it was deleted. The
    weights of the source are its masters where the copy was made from these. `allow`: names that the user accepts.

    Raises Refused with the faults of the source's.
    """
    copy, are_masters = copy_side.checkpoint, _has_masters_as_weights(copy_side)
    if copy is not None and copy.is_nanotron and has_state(copy.root) and STATES not in allow:
        copy = replace(copy, state=problems.collect(open_state, copy, max_nbytes, problems))
    elif not are_masters:
        return source, copy_side
    faults = Problems()
    state = faults.collect(open_state, source, max_nbytes, faults) if source.is_nanotron else None
    faults.raise_if_any()
    source, copy_side = replace(source, state=state), replace(copy_side, checkpoint=copy)
    if are_masters and state is not None and state.has_masters and (copy is None or copy.state is None):
        source = replace(source, weights=StateWeights(source.weights, state, MASTERS))
    return source, copy_side


def _has_masters_as_weights(copy_side: Side) -> bool:
    """True if the weights of the copy are the masters of the source, by its manifest."""
    return copy_side.manifest is not None and copy_side.manifest.facts.get("from_masters") is True


def differences(source: Checkpoint, copy: Checkpoint, notes: list[str]) -> Iterator[DifferenceError]:
    """Errors for all but tensors in which two training states differ, or that one of the copy has by itself. Remarks go
    to `notes`."""
    if copy.state is None:
        return
    if source.state is not None:
        yield from state_differences(source.state, copy.state)
        notes.extend(state_notes(source.state, copy.state))
    else:
        notes.append(f"{quoted(copy.root)} has a training state and the source has none, so it is checked by itself")
    yield from sum_differences(source.state, copy.state, notes)


def lack_of_state(source: Checkpoint, copy_side: Side) -> DifferenceError | str | None:
    """The difference that a copy has no training state and the source has one; a remark where that is meant, as in a
    Hugging Face folder, or after a conversion that wrote weights only; else None."""
    copy = copy_side.checkpoint
    if copy is None or not source.is_nanotron or not has_state(source.root) or (
            copy.is_nanotron and has_state(copy.root)):
        return None
    if not copy.is_nanotron:
        return "the training state of the source is not in the copy: Hugging Face's format holds none"
    if copy_side.manifest is not None and not any(file.path.startswith(f"{OPTIMIZER}/")
                                                  for file in copy_side.manifest.entries()):
        return "the training state of the source is not in the copy: it was converted as weights only"
    return DifferenceError(f"the source has a training state, {quoted(copy.root)} has none (--allow {STATES} accepts "
                           f"it)")
