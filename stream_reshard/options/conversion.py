"""Options of a conversion."""
from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stream_reshard.machine import memory
from stream_reshard.model.topology import Topology
from stream_reshard.options.declaring import ACCEPTED, RUN, SAFETY, Declared, option, options_of
from stream_reshard.options.resources import Dtype, Resources

Format = Literal["nanotron", "hf"]
Rope = Literal["auto", "neox", "interleaved"]
NanotronConfig = Literal["auto", "LlamaConfig", "Qwen2Config"]
Version = Literal["1.5", "1.4", "1.2"]
Io = Literal["auto", "mmap", "pread"]
Digests = Literal["auto", "all", "none"]
Schedule = Literal["saved", "exact"]

ALLOWABLE = {
    "rope_scaling": "convert although Nanotron rotates q and k with unscaled frequencies",
    "rope_theta": "convert for release 0.4 although it has no base but 10000",
    "partial_rotary_factor": "convert although Nanotron rotates whole heads",
    "sliding_window": "convert although Nanotron attends to all earlier tokens",
    "global_batch": "move a training although a step will take another number of samples, or some again",
    "hidden_act": "give Nanotron the name of an activation other than silu",
}
"""The names for --allow in a conversion, with their meanings."""


@dataclass(frozen=True)
class Folders(Declared):
    """The folders of a conversion."""

    source: Path
    destination: Path | None = None
    """None: a plan only."""


@dataclass(frozen=True, kw_only=True)
class Options(Folders, Resources):
    """All options of a conversion."""

    to: Format | None = option(None, "format of DST; required if SRC is a Nanotron checkpoint",
                               shown="nanotron")
    tp: int = option(1, "tensor-parallel ranks", metavar="T", least=1)
    pp: int = option(1, "pipeline stages, balanced as Nanotron balances them", metavar="P", least=1)
    dp: int = option(1, "data-parallel replicas, for config.yaml and for the state of a training "
                    "with ZeRO; changes no weight file", metavar="D", least=1)
    layers: int | None = option(None, "take the first N decoder layers only, with embedding, final norm and head: a "
                                "trial of the whole chain on a large model. DST is marked as truncated", metavar="N",
                                least=1, shown="all")
    zero: int | None = option(None, "stage of ZeRO, 0 or 1, in which the state of a training is written", metavar="N",
                              least=0, shown="that of SRC")
    schedule: Schedule = option("saved", "learning-rate schedule of a training that goes on: saved, as Nanotron saves "
                                "it, which skips a step and bends the curve when it resumes; exact, so that Nanotron "
                                "as it is today goes on as if nothing had happened")
    from_masters: bool = option(False, "with --to hf: the weights are the float32 masters in the optimizer of SRC, "
                                "which know more than the weights beside them; --dtype rounds them")
    weights_only: bool = option(False, "leave the optimizer, its masters and the schedule of a Nanotron SRC behind")
    template: Path | None = option(None, "a Nanotron checkpoint, such as one saved from a random model: DST gets its "
                                   "files, names, versions, slices and dtypes; the plan lists the tensors in which "
                                   "they differ from this tool's own choice", metavar="DIR")
    dtype: Dtype = option("keep", "dtype of the weights in DST; a cast rounds to nearest even, as torch does, and "
                          "counts weights that became infinite; NaN becomes the quiet NaN of its sign")
    rope: Rope = option("auto", "order of the rows of q and k in a head: neox as in Hugging Face, interleaved as in "
                        "release 0.4; auto: the order of SRC, for format 1.2 interleaved")
    nanotron_config: NanotronConfig = option("auto", "Nanotron's config class; auto: LlamaConfig for Llama, "
                                             "Qwen2Config for Qwen2")
    checkpoint_version: Version = option("1.5", "format version: 1.5 for Nanotron's main, 1.4 for its source trees "
                                         "from September 2024 on, 1.2 for release 0.4, which interleaves RoPE and has "
                                         "no base but 10000")
    vocab_multiple: int = option(1, "Nanotron's make_vocab_size_divisible_by", metavar="N", least=1)
    vocab_size: int | None = option(None, "rows of the embedding without padding, for a Nanotron SRC without a "
                                    "manifest of this tool", metavar="N", least=1)
    max_shard_size: int = option(5 * 10**9, "largest number of bytes in a Hugging Face shard; a larger tensor gets a "
                                 "shard of its own", metavar="SIZE", parse=memory.parse_nbytes, least=1, shown="5GB")
    tokenizer: Path | None = option(None, "folder of the tokenizer and generation files; licences and README.md come "
                                    "from SRC. Code that tokenizer_config.json names is copied and never run",
                                    metavar="DIR", shown="SRC")
    allow: tuple[str, ...] = option((), "accept a setting of SRC that Nanotron will not honour, by its name; "
                                    "--allow list shows the names",
                                    metavar="NAME", group=ACCEPTED)
    verify: bool = option(False, "compare every weight, header and file with SRC before DST gets its name",
                          group=SAFETY)
    source_sha256: str | None = option(None, "check the files of SRC first: FILE as sha256sum writes it, or `cache` "
                                       "for links to blobs that are named by their sha256", metavar="FILE",
                                       group=SAFETY)
    io: Io = option("auto", "way in which SRC is read: pread reads into buffers, mmap writes from a mapping; auto: "
                    "pread, which measured faster", group=RUN)
    digests: Digests = option("auto", "tensor files that get a digest in the manifest; auto: all but files that share "
                              "blocks with SRC, which are not read, and those of the optimizer, which hold checksums; "
                              "all: these too, by reading them back", group=RUN)
    overwrite: bool = option(False, "replace the checkpoint at DST, or a folder that this tool made there, once the "
                             "new one is complete; no other folder is ever replaced", group=SAFETY)
    restart: bool = option(False, "delete the files that an interrupted run left in DST.partial; a file that no run "
                           "has written is refused, by name", group=SAFETY)
    break_lock: bool = option(False, "take the lock of a run on another machine, or in another container, that you "
                              "know to be dead; the lock of a living process on this machine is never taken",
                              group=SAFETY)

    @property
    def topology(self) -> Topology:
        """Sizes of Nanotron's parallel axes."""
        return Topology(self.tp, self.pp, self.dp)


_NANOTRON_ONLY = ("tp", "pp", "rope", "vocab_multiple", "nanotron_config", "checkpoint_version", "zero", "schedule")
"""Options of which only a Nanotron target makes use."""


def flags_of(options: Options, names: Collection[str]) -> Iterator[str]:
    """The flags of these options, where they have another value than by default."""
    for own in options_of(Options):
        if own.name in names and getattr(options, own.name) != own.default:
            yield own.flag


def nanotron_flags(options: Options) -> Iterator[str]:
    """The flags among the options that only a Nanotron target makes use of."""
    yield from flags_of(options, _NANOTRON_ONLY)
