"""The training state of a run: its plan, and the files that its jobs write together."""
from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from stream_reshard.destination.manifest import FileDone
from stream_reshard.destination.staging import Staging
from stream_reshard.formats.layout import SharedFiles
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.plan import Plan
from stream_reshard.storage.durable import WriteFault
from stream_reshard.storage.shared_file import write_between
from stream_reshard.storage.source_file import digest_of


@dataclass(frozen=True)
class States:
    """A training state to be written."""

    plan: Plan
    files: SharedFiles

    @property
    def max_crcs(self) -> int:
        """Upper limit on the number of tensors in all parts of files."""
        target = self.plan.target
        return target.model.firsts[-1] * target.most_files

    def finish(self, staging: Staging, stop: Stop, buffer: memoryview | None) -> Iterator[FileDone]:
        """Write what stands between the states of each file, once they are all there, and make the files durable.
        `buffer`: for the digests of whole files, which the manifest then gets."""
        found = self._crcs(staging)
        for path, size in self.files.sizes():
            stop.check()
            staging.confirm_at_times()
            rest = list(self.files.rest_of(path, dict(zip(*found.pop(path)))))
            try:
                write_between(staging.folder, path, size, rest)
            except WriteFault:  # Once more, as for jobs.
                write_between(staging.folder, path, size, rest)
            yield FileDone(path, size, digest_of(staging.path, path, buffer, stop) if buffer else None)

    def _crcs(self, staging: Staging) -> dict[str, tuple[array[int], array[int]]]:
        """(offset of each state, its CRC-32) in each file, by the file's path."""
        found: dict[str, tuple[array[int], array[int]]] = {}
        for job in self.plan.jobs:
            crcs = iter(staging.journal.crcs[job.index])
            for part in job.files:
                begins, own = found.setdefault(part.path, (array("Q"), array("I")))
                begins.extend(tensor.begin for tensor in part.tensors)
                own.extend(next(crcs) for _ in part.tensors)
        return found
