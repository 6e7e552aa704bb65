"""Output: everything that will stand in a destination."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard.destination.companions import Companion
from stream_reshard.destination.journal import Record
from stream_reshard.destination.manifest import Manifest
from stream_reshard.destination.removal import Naming
from stream_reshard.destination.staging import finished
from stream_reshard.plan.plan import Plan
from stream_reshard.run.states import States
from stream_reshard.storage.identity import Identity, lasting


@dataclass(frozen=True)
class Output:
    """Everything that will stand in a destination."""

    plan: Plan
    destination: Path
    """Absolute, links resolved."""
    documents: Mapping[str, bytes]
    """Small files by name; one of them is the marker."""
    marker: str
    """The file whose presence makes a folder a checkpoint; written last."""
    documents_sha256: str
    """Digest of the documents, wherever the destination is: some of them name it."""
    naming: Naming
    """Names of files that may be removed where no manifest tells."""
    companions: Mapping[str, Companion]
    """Files to copy, by name."""
    identities: Mapping[str, Identity]
    """The source files as the plan saw them, by path below the source's root."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest: what the output itself cannot say."""
    states: States | None = None
    """The training state; None for weights alone."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of weights and of states."""
        return (self.plan, self.states.plan) if self.states else (self.plan,)

    @property
    def run(self) -> dict[str, Any]:
        """Identity of the run: `same_run` for two attempts at the same output, and for nothing else. Of files only what
        lasts is in it, so that it can be taken up after a reboot, a remount, and on another machine."""
        copied = {str(own.path): [name, *lasting(own.identity)] for name, own in self.companions.items()}
        states = {"states_sha256": self.states.plan.digest} if self.states else {}
        return {"plan_sha256": self.plan.digest, **states, "documents_sha256": self.documents_sha256,
                "source": str(self.plan.source.root),
                "identities": {path: lasting(identity) for path, identity in self.identities.items()},
                "copied": copied}

    def finished(self) -> Manifest | None:
        """The manifest of a destination that holds this output, finished; None for anything else."""
        return finished(self.destination, self.run, self.max_files)

    def is_done(self) -> bool:
        """The destination holds this very output already."""
        manifest = self.finished()
        return manifest is not None and not self.moved(manifest)

    def moved(self, manifest: Manifest) -> list[str]:
        """Documents of a finished destination that name another place than the one where it stands."""
        return [name for name, text in self.documents.items()
                if name not in manifest.files
                or manifest.files[name].xxh3_128 != xxhash.xxh3_128(text).hexdigest()]

    @property
    def record(self) -> Record:
        """The beginning of its journal."""
        tensor_files = [path for path in self.paths if not self.naming.is_weights(path)]
        return Record(self.run, self.marker, [*self.documents, *self.companions, *tensor_files], self.max_files,
                      self.states.max_crcs if self.states else 0)

    @property
    def paths(self) -> Iterator[str]:
        """The tensor files, those of states included."""
        return (path for plan in self.plans for path in plan.target.paths)

    @property
    def num_files(self) -> int:
        """Number of tensor files, those of states included."""
        return sum(plan.target.num_files for plan in self.plans)

    @property
    def shards(self) -> Iterator[Path]:
        """The tensor files of the source."""
        return (plan.source.root / path for plan in self.plans for path in plan.source.paths)

    @property
    def max_files(self) -> int:
        """More files than its manifest can name."""
        return self.num_files + len(self.documents) + len(self.companions) + len(self.identities) + 8
