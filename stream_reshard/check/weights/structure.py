"""Differences between two folders in everything but the values of weights; each is a fault, or accepted."""
from __future__ import annotations

from dataclasses import dataclass, field

from stream_reshard.check.weights.agreement import (
    Setting, dtype_differences, parameter_differences, setting_differences, vocabulary_difference)
from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import shape_difference
from stream_reshard.check.weights.files import FilesOfManifest, file_set
from stream_reshard.check.weights.scope import STATES, cast_to, rule_of
from stream_reshard.check.weights.side import Side
from stream_reshard.check.weights.start import TrainingFolder
from stream_reshard.check.weights.states.presence import differences as state_differences
from stream_reshard.check.weights.states.presence import lack_of_state
from stream_reshard.check.weights.states.state import has_state
from stream_reshard.check.weights.tasks import shared
from stream_reshard.check.weights.token_ids import id_differences
from stream_reshard.check.weights.training import training_problems
from stream_reshard.errors import Problems, ResourceError, quoted
from stream_reshard.formats.nanotron.rules import STAGES
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.machine import memory
from stream_reshard.options import VerifyOptions


@dataclass(frozen=True)
class Found:
    """Findings about two folders."""

    differences: Problems = field(default_factory=Problems)
    accepted: list[str] = field(default_factory=list)
    """Accepted differences, each with the option or manifest that accepts it."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user."""


def compare_structure(source: Checkpoint, copy_side: Side, options: VerifyOptions, allowed: int,
                      found: Found) -> FilesOfManifest | None:
    """Collect in `found` all differences but those of weights and digests; returns the files of the copy's manifest.
    `allowed`: limit on memory, in bytes."""
    copy = copy_side.checkpoint
    manifest_files, differences = file_set(copy_side.root, copy, copy_side.manifest, options.ignored, options.allow)
    if copy is None:
        return manifest_files
    found.differences.extend(differences)
    for setting in setting_differences(source, copy):
        _judge(setting, copy, copy_side, options, found)
    found.differences.extend(id_differences(source, copy, options.allow))
    if copy.num_moved:
        found.accepted.append(f"{STAGES}: {copy.num_moved} files stand on other stages than in Nanotron's balancing; "
                              f"{_acceptor(STAGES, options)}")
    is_cast, asked = cast_to(copy_side, options) is not None, options.dtype != "keep"
    cast_dtype = None if asked or copy_side.dtype == "keep" else copy_side.dtype
    found.differences.extend([
        *vocabulary_difference(source, copy), *parameter_differences(source, copy),
        *dtype_differences(source, copy, cast_dtype, is_cast)])
    if options.quick:
        rule = rule_of(source, copy, copy_side, options, 0)
        found.differences.extend(filter(None, (
            shape_difference(name, source, copy, rule) for name in shared(source, copy))))
    _compare_states(source, copy, copy_side, options, found)
    if copy.topology is not None:
        folder = TrainingFolder(copy_side.root, options.name or copy_side.root, copy_side.manifest)
        limit = memory.yaml_limit(allowed, memory.resident())
        problems, elsewhere = training_problems(folder, copy, copy.topology, limit, found.notes)
        is_accepted = CONFIG_YAML in options.allow and not any(isinstance(p, ResourceError) for p in elsewhere)
        found.differences.extend([*problems, *(elsewhere if not is_accepted else ())])
        found.accepted.extend(f"{text}; {_acceptor(CONFIG_YAML, options)}" for text in elsewhere if is_accepted)
    return manifest_files


def _compare_states(source: Checkpoint, copy: Checkpoint, copy_side: Side, options: VerifyOptions,
                    found: Found) -> None:
    """Collect the differences of training states in everything but tensors."""
    found.differences.extend(state_differences(source, copy, found.notes))
    if STATES in options.allow and copy.is_nanotron and has_state(copy.root):
        found.accepted.append(f"{STATES}: the training state is not compared; {_acceptor(STATES, options)}")
    lack = lack_of_state(source, copy_side)
    if isinstance(lack, str):
        found.notes.append(lack)
    elif lack is not None and STATES in options.allow:
        found.accepted.append(f"{STATES}: {quoted(copy.root)} has no training state; {_acceptor(STATES, options)}")
    elif lack is not None:
        found.differences.append(lack)


def _judge(setting: Setting, copy: Checkpoint, copy_side: Side, options: VerifyOptions, found: Found) -> None:
    """Add a setting to the accepted ones or to the differences. The copy's manifest accepts settings that the copy does
    not state; only the user accepts another value."""
    if setting.name in options.allow or (setting.name in copy_side.allowed and setting.in_copy is None):
        found.accepted.append(f"{setting.text(copy)}; {_acceptor(setting.name, options)}")
    else:
        found.differences.append(setting.difference(copy))


def _acceptor(name: str, options: VerifyOptions) -> str:
    return f"by --allow {name}" if name in options.allow else "by DST's manifest"
