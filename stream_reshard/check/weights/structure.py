"""Differences between two folders that show without a look at the weights, and which of them are let pass, by whom."""
from __future__ import annotations

from dataclasses import dataclass, field

from stream_reshard.check.weights.agreement import (
    Setting, dtype_differences, parameter_differences, setting_differences, vocabulary_difference)
from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import shape_difference
from stream_reshard.check.weights.files import CONFIG_YAML, FilesOfManifest, file_set
from stream_reshard.check.weights.scope import cast_to, rule_of
from stream_reshard.check.weights.side import Side
from stream_reshard.check.weights.start import Folder
from stream_reshard.check.weights.tasks import shared
from stream_reshard.check.weights.token_ids import id_differences
from stream_reshard.check.weights.training import training_problems
from stream_reshard.errors import Problems, ResourceError, quoted
from stream_reshard.formats.nanotron.rules import STAGES
from stream_reshard.machine import memory
from stream_reshard.options import VerifyOptions


@dataclass(frozen=True)
class Found:
    """Findings about two folders, without a look at the weights."""

    differences: Problems = field(default_factory=Problems)
    accepted: list[str] = field(default_factory=list)
    """Differences that were let pass, each with the option or manifest that accepts it."""
    notes: list[str] = field(default_factory=list)
    """Remarks that are no differences."""


def compare_structure(original: Side, other: Side, options: VerifyOptions, allowed: int,
                      found: Found) -> FilesOfManifest | None:
    """Collect in `found` all differences that show without a look at the weights; returns the files of the copy's
    manifest."""
    source, copy = original.checkpoint, other.checkpoint
    told, differences = file_set(other.root, copy, other.manifest, options.ignored, options.allow)
    if copy is not None:
        found.differences.extend(differences)
    if source is None or copy is None:
        return told
    for setting in setting_differences(source, copy):
        _judge(setting, copy, other, options, found)
    found.differences.extend(id_differences(source, copy, options.allow))
    if copy.num_moved:
        found.accepted.append(f"{STAGES}: {copy.num_moved} files stand on other stages than Nanotron's balancing gives "
                              f"them; {_who(STAGES, options)}")
    is_cast = cast_to(other, options) is not None
    found.differences.extend([
        *vocabulary_difference(source, copy), *parameter_differences(source, copy), *dtype_differences(
            source, copy, other.dtype if "keep" == options.dtype != other.dtype else None, is_cast)])
    if options.quick:
        rule = rule_of(source, copy, other, options, 0)
        found.differences.extend(filter(None, (
            shape_difference(name, source, copy, rule) for name in shared(source, copy))))
    if copy.is_nanotron:
        folder = Folder(other.root, options.name or other.root, other.manifest)
        limit = memory.yaml_limit(allowed, memory.resident())
        problems, elsewhere = training_problems(folder, copy, limit, found.notes)
        is_accepted = CONFIG_YAML in options.allow and not any(isinstance(p, ResourceError) for p in elsewhere)
        found.differences.extend([*problems, *(elsewhere if not is_accepted else ())])
        found.accepted.extend(f"{text}; {_who(CONFIG_YAML, options)}" for text in elsewhere if is_accepted)
    return told


def _judge(setting: Setting, copy: Checkpoint, other: Side, options: VerifyOptions, found: Found) -> None:
    """Let a difference pass that a user accepts. One that only the copy's manifest accepts passes where the copy does
    not state the setting, but not where it states another value."""
    if setting.name in options.allow or (setting.name in other.allowed and setting.mine is None):
        found.accepted.append(f"{setting.name}: the source says: {setting.theirs}; {quoted(copy.root)} says: "
                              f"{setting.mine or 'nothing'}; {_who(setting.name, options)}")
    else:
        found.differences.append(setting.difference(copy))


def _who(name: str, options: VerifyOptions) -> str:
    return f"--allow {name}" if name in options.allow else "as DST's manifest says"
