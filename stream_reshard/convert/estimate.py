"""An estimate of the time that a run takes, from a trial of its disks."""
from __future__ import annotations

from dataclasses import dataclass, replace

from stream_reshard.convert.conversion import Conversion
from stream_reshard.destination.refusals import existing_parent
from stream_reshard.plan.alignment import cloneable_nbytes
from stream_reshard.run.trial import Trial, try_disks
from stream_reshard.storage.cloning import can_clone_all
from stream_reshard.storage.small_files import real_path
from stream_reshard.storage.source_file import SourceFile


@dataclass(frozen=True)
class Estimate:
    """The time of a run."""

    seconds: float
    trial: Trial


def with_estimate(conversion: Conversion) -> Conversion:
    """The conversion with its estimate, or with a note that says why it has none. Writes a file without a name beside
    the destination. Raises SourceError or ResourceError where the source cannot be read."""
    if conversion.options.destination is None:
        return _without(conversion, "there is no DST to write beside")
    source, identities = conversion.plan.source, conversion.identities
    sizes = [(path, identities[path][2]) for path in source.paths]
    folder = existing_parent(real_path(conversion.options.destination))
    try:
        trial = try_disks(lambda path: SourceFile(source.root, path, identities[path]), sizes, folder,
                          conversion.memory.block_nbytes)
    except OSError as error:
        return _without(conversion, f"nothing can be written beside DST ({error.strerror or error})")
    return replace(conversion, estimate=Estimate(_seconds(conversion, trial), trial))


def _without(conversion: Conversion, reason: str) -> Conversion:
    return replace(conversion, notes=(*conversion.notes, f"the time is not estimated: {reason}"))


def _seconds(conversion: Conversion, trial: Trial) -> float:
    """Seconds until every byte is copied, and with --verify read once more on both sides. Bytes that are cloned, and
    files that are kept, take no time."""
    source, target = conversion.plan.source, conversion.plan.target
    num_read = sum(plan.source.nbytes for plan in conversion.plans)
    nbytes = max(num_read, conversion.nbytes)
    if can_clone_all(source.root, source.paths, existing_parent(real_path(conversion.output.destination))):
        nbytes -= cloneable_nbytes(source, target)
    seconds = nbytes * (1 - conversion.num_kept / conversion.num_files) / trial.copying.per_second
    if conversion.options.verify:
        seconds += (num_read + conversion.nbytes) / trial.reading.per_second
    return seconds
