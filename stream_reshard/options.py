"""Options: everything a user can choose about a conversion, as one value."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.machine import memory
from stream_reshard.model.topology import Topology


_NANOTRON_FLAGS = {"rope": "--rope", "vocab_multiple": "--vocab-multiple", "config_class": "--nanotron-config",
                   "version": "--checkpoint-version"}
"""Flags that choose something which only a Nanotron checkpoint has, by the field of Options."""


@dataclass(frozen=True)
class Options:
    """Everything a user can choose about a conversion."""

    source: Path
    destination: Path | None
    """None where only a plan is asked for."""
    topology: Topology = Topology()
    to: str | None = None
    """nanotron or hf; None is Nanotron, for a source of another format."""
    config_class: str = "auto"
    """auto, LlamaConfig or Qwen2Config."""
    version: str = "1.5"
    rope: str = "auto"
    """auto, neox or interleaved."""
    vocab_multiple: int = 1
    vocab_size: int | None = None
    """Rows of the embedding without padding, of a Nanotron source that does not say it."""
    max_shard_nbytes: int = 5 * 10**9
    """Bytes of tensors in a Hugging Face shard, at most."""
    template: Path | None = None
    """A Nanotron checkpoint whose files, names, versions, slices and dtypes the target takes over."""
    tokenizer: Path | None = None
    """A folder whose tokenizer files go into the destination; None: those of the source."""
    dtype: str = "keep"
    """keep, bfloat16, float16 or float32."""
    allow: tuple[str, ...] = ()
    max_memory: int = memory.DEFAULT_ALLOWED
    """Unsupported on the peak resident set of the process tree, in bytes."""
    num_workers: int | None = None
    """Jobs that may move bytes at the same time; they share `max_memory`. None: as many as measured best."""
    io: str = "auto"
    """auto, mmap or pread: how the source is read."""
    digests: str = "auto"
    """auto, all or none: which tensor files get a digest."""
    restart: bool = False
    """Throw away what an interrupted run left."""
    overwrite: bool = False
    """Replace a checkpoint at the destination, once the new one is complete."""
    break_lock: bool = False
    """Take the place of a run on another machine."""
    verify: bool = False
    """Compare everything with the source before the commit."""
    source_sha256: str | None = None
    """A file as sha256sum writes it, or `cache`: sums that the shards must have."""

    @property
    def workers(self) -> int:
        """`num_workers`, or what measured best. Raises UsageError for less than one."""
        return memory.chosen_workers(self.num_workers, self.allowed_memory)

    @property
    def allowed_memory(self) -> int:
        """`max_memory`, but never more than the machine has."""
        return min(self.max_memory, memory.machine_limit())


def nanotron_flags(options: Options) -> Iterator[str]:
    """The flags that were given and choose how a Nanotron checkpoint is cut anew."""
    for name, flag in _NANOTRON_FLAGS.items():
        if getattr(options, name) != getattr(Options, name):
            yield flag
    if (options.topology.tp, options.topology.pp) != (1, 1):
        yield "--tp, --pp"
