"""The plan and the outcome of a conversion: for a person, and as JSON."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stream_reshard.convert.conversion import Conversion
from stream_reshard.errors import shown
from stream_reshard.machine.memory import human
from stream_reshard.report import Reported, note_lines
from stream_reshard.run.output import Done
from stream_reshard.storage.dtypes import TORCH_DTYPES

_MAX_LISTED = 16
"""Limit on companions that are named; the rest are counted."""


def as_json(conversion: Conversion) -> dict[str, Any]:
    """The plan as one JSON document; sizes in bytes."""
    plan, options, target = conversion.plan, conversion.options, conversion.target.facts(conversion.plan.target)
    config = plan.target.model.config
    stages, rows = target.pop("stages", []), target.pop("vocab_rows", config.vocab_size)
    return {
        "source": {"path": str(plan.source.root), "format": plan.source.format, "family": config.family,
                   "num_shards": plan.source.num_files, "nbytes": plan.source.nbytes},
        "target": {"path": str(options.destination) if options.destination else None, **target,
                   "num_files": plan.target.num_files, "nbytes": plan.nbytes, "dtype": conversion.dtype},
        "num_parameters": plan.target.model.num_elements,
        "vocab": {"size": config.vocab_size, "padded": rows},
        "tied": config.tie_word_embeddings, "stages": stages,
        "casts": {f"{TORCH_DTYPES[a]} to {TORCH_DTYPES[b]}": n for (a, b), n in plan.casts.items()},
        "num_jobs": len(plan.jobs), "largest_job_nbytes": plan.largest_job_nbytes,
        "memory": {"allowed": conversion.memory.allowed, "reserved": conversion.memory.reserved,
                   "projected": conversion.memory.projected, "num_workers": conversion.memory.num_workers,
                   "block_nbytes": conversion.memory.block_nbytes},
        "copied": list(conversion.companions), "disk_nbytes": conversion.disk_nbytes,
        "disk_free_nbytes": conversion.disk_free, "notes": list(conversion.notes), "plan_sha256": plan.digest}


def plan_lines(conversion: Conversion) -> Iterator[str]:
    """The plan for a person."""
    facts = as_json(conversion)
    source, target, memory = facts["source"], facts["target"], facts["memory"]
    yield (f"source   {shown(source['path'])}  ({source['format']}, {source['family']}, "
           f"{facts['num_parameters'] / 1e6:,.1f} M parameters, {source['num_shards']} "
           f"{conversion.plan.source.files_word}, {human(source['nbytes'])})")
    yield (f"target   {shown(target['path'] or '(not given)')}  ({target['format']} {conversion.target}, "
           f"{target['dtype']})")
    yield from conversion.target.lines(conversion.plan.target, facts)
    vocab = facts["vocab"]
    padding = f"padded to {vocab['padded']} with zeros" if vocab["padded"] != vocab["size"] else "no padding"
    yield f"vocab    {vocab['size']} rows, {padding}{', head tied to the embedding' if facts['tied'] else ''}"
    for cast, number in facts["casts"].items():
        yield f"cast     {number} parameters from {cast}"
    yield f"jobs     {facts['num_jobs']}, the largest writes {human(facts['largest_job_nbytes'])}"
    yield (f"memory   reserved {human(memory['reserved'])}, projected {human(memory['projected'])} of "
           f"{human(memory['allowed'])} allowed ({memory['num_workers']} workers)")
    free = f", {human(facts['disk_free_nbytes'])} free" if facts["disk_free_nbytes"] is not None else ""
    yield f"disk     {human(facts['disk_nbytes'])} in {target['num_files']} files{free}"
    if copied := facts["copied"]:
        more = f" and {len(copied) - _MAX_LISTED} more" if len(copied) > _MAX_LISTED else ""
        yield f"along    {', '.join(map(shown, copied[:_MAX_LISTED]))}{more}"
    yield from note_lines(facts)


@dataclass(frozen=True, repr=False)
class Result(Reported):
    """A conversion that ended well; the destination is durable."""

    conversion: Conversion
    seconds: float
    peak_nbytes: int
    """Highest resident set of this process."""
    io: Mapping[str, int]
    """Bytes by the kernel's counters during the run (proc_pid_io(5)): rchar, wchar, read_bytes, write_bytes."""
    done: Done

    @property
    def already_done(self) -> bool:
        """True if the destination held this output before the run, and was kept."""
        return self.done.was_finished and not self.conversion.options.overwrite

    @property
    def facts(self) -> dict[str, Any]:
        """The plan and its outcome, as JSON; sizes in bytes."""
        if self.already_done:
            return as_json(self.conversion) | {"already_done": True}
        done = self.done
        return as_json(self.conversion) | {
            "seconds": round(self.seconds, 3), "peak_nbytes": self.peak_nbytes, "num_files_kept": done.num_kept,
            "leftovers": list(map(str, done.leftovers)), "num_digests": done.num_digests,
            "nbytes_cloned": done.moved.cloned, "nbytes_copied": done.moved.copied,
            "nbytes_strided": done.moved.strided, "num_overflowed": done.moved.num_overflowed, "io": dict(self.io),
            "verified": self.conversion.options.verify, "next": self._next_step[1]}

    @property
    def lines(self) -> tuple[str, ...]:
        """Summary of the run, for a person."""
        word, command = self._next_step
        return (*(self._already_done_lines() if self.already_done else self._summary()), f"{word:<8} {command}")

    @property
    def _next_step(self) -> tuple[str, str]:
        """(word, command) that a user wants to run next."""
        return self.conversion.target.next_step(self.conversion.output.destination)

    def _summary(self) -> Iterator[str]:
        conversion, done, memory = self.conversion, self.done, self.conversion.memory
        options, plan = conversion.options, conversion.plan
        yield (f"done     {plan.target.num_files} files, {human(plan.nbytes)} in {self.seconds:.1f} s "
               f"({human(plan.nbytes / max(self.seconds, 1e-9))}/s), durable in {shown(options.destination)}")
        yield from (f"left     {shown(path)}: the old checkpoint could not be removed" for path in done.leftovers)
        if done.num_kept:
            yield f"resumed  {done.num_kept} files were kept from an earlier run, each with the digest in its journal"
        yield self._moved_line()
        if done.moved.num_overflowed:
            yield (f"overflow {done.moved.num_overflowed} weights were too large for {options.dtype} and are infinite "
                   f"now; choose another --dtype")
        if options.verify:
            yield "verified every weight, header and file against the source, before the commit: all equal"
        yield (f"memory   peak {human(self.peak_nbytes)} measured, {human(memory.projected)} projected, "
               f"{human(memory.allowed)} allowed")

    def _moved_line(self) -> str:
        moved, io = self.done.moved, self.io
        line = f"moved    {human(moved.cloned)} cloned, {human(moved.copied)} copied, {human(moved.strided)} rearranged"
        if io:
            line += f"; {human(io['rchar'])} read and {human(io['wchar'])} written by calls"
        num_without = self.conversion.plan.target.num_files - self.done.num_kept - self.done.num_digests
        if num_without > 0:
            line += f"; {num_without} files have no digest" + (
                ", as they share blocks (--digests all reads them)" if moved.cloned else "")
        return line

    def _already_done_lines(self) -> Iterator[str]:
        options = self.conversion.options
        proof = "and equals the source" if options.verify else "`verify` proves it"
        yield (f"done     {shown(options.destination)} holds this conversion already, complete; {proof}, --overwrite "
               f"makes it anew")
