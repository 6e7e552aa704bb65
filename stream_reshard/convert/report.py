"""Reports for a person and as JSON: the plan, the summary of a run."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stream_reshard.convert.conversion import Conversion
from stream_reshard.errors import shell_word, shown
from stream_reshard.formats.base import NextStep
from stream_reshard.machine.memory import big, counted, duration, human
from stream_reshard.report import Reported, layers_lines, note_lines, wrapped
from stream_reshard.run.writing import Done
from stream_reshard.storage.dtypes import TORCH_DTYPES

_MAX_LISTED = 16
"""Companions that are named."""


def as_json(conversion: Conversion) -> dict[str, Any]:
    """The plan as one JSON document; sizes in bytes."""
    plan, options, target = conversion.plan, conversion.options, conversion.target.facts(conversion.plan.target)
    config = plan.target.model.config
    stages, rows = target.pop("stages", []), target.pop("vocab_rows", config.vocab_size)
    return {
        "source": {"path": str(plan.source.root), "format": plan.source.format, "family": config.family,
                   "num_shards": plan.source.num_files, "nbytes": plan.source.nbytes,
                   **(conversion.source.origin or {})},
        "target": {"path": str(options.destination) if options.destination else None, **target,
                   "num_files": conversion.num_files, "nbytes": conversion.nbytes, "dtype": conversion.dtype},
        "num_parameters": plan.target.model.num_elements,
        "num_layers": config.num_hidden_layers, "whole_num_layers": config.whole_num_hidden_layers,
        "vocab": {"size": config.vocab_size, "padded": rows},
        "tied": config.tie_word_embeddings, "stages": stages,
        "casts": {f"{TORCH_DTYPES[a]} to {TORCH_DTYPES[b]}": n for (a, b), n in plan.casts.items()},
        "num_jobs": sum(len(part.jobs) for part in conversion.plans),
        "largest_job_nbytes": max(part.largest_job_nbytes for part in conversion.plans),
        "memory": {"allowed": conversion.memory.allowed, "reserved": conversion.memory.reserved,
                   "projected": conversion.memory.projected, "num_workers": conversion.memory.num_workers,
                   "block_nbytes": conversion.memory.block_nbytes},
        "copied": list(conversion.companions), "disk_nbytes": conversion.disk_nbytes,
        "num_files_kept": conversion.num_kept,
        "disk_free_nbytes": conversion.disk_free, "time": _time_as_json(conversion),
        "notes": list(conversion.notes), "plan_sha256": plan.digest}


def _time_as_json(conversion: Conversion) -> dict[str, Any] | None:
    """The estimate of the time, as JSON."""
    if conversion.estimate is None:
        return None
    trial = conversion.estimate.trial
    return {"seconds_estimated": round(conversion.estimate.seconds, 3),
            "read_nbytes_per_second": round(trial.reading.per_second),
            "copied_nbytes_per_second": round(trial.copying.per_second), "nbytes_tried": trial.nbytes}


def plan_lines(conversion: Conversion) -> Iterator[str]:
    """The plan for a person, in 80 columns but for paths and notes."""
    facts = as_json(conversion)
    source, target, memory = facts["source"], facts["target"], facts["memory"]
    yield f"source   {shown(source['path'])}"
    yield (f"         {source['format']}, {source['family']}, {big(facts['num_parameters'])} parameters, "
           f"{human(source['nbytes'])} in {counted(source['num_shards'], conversion.plan.source.file_word)}")
    if origin := conversion.source.origin:
        yield f"         {origin['repo']} on the hub, commit {origin['commit']}"
    yield from layers_lines(facts)
    yield f"target   {shown(target['path'] or '(not given)')}"
    yield from wrapped(f"{target['format']} {conversion.target}, {target['dtype']}")
    yield from conversion.target.lines(conversion.plan.target, facts)
    vocab = facts["vocab"]
    padding = f"padded to {vocab['padded']} with zeros" if vocab["padded"] != vocab["size"] else "no padding"
    yield f"vocab    {vocab['size']} rows, {padding}{', head tied to the embedding' if facts['tied'] else ''}"
    for cast, number in facts["casts"].items():
        yield f"cast     {counted(number, 'parameter')} from {cast}"
    if kept := facts["num_files_kept"]:
        yield f"resume   {kept} of {target['num_files']} files are done already, and are kept"
    yield f"jobs     {facts['num_jobs']}, the largest writes {human(facts['largest_job_nbytes'])}"
    yield (f"memory   {human(memory['projected'])} at most with {counted(memory['num_workers'], 'worker')}, "
           f"{human(memory['allowed'])} allowed, {human(memory['reserved'])} held now")
    free = f", {human(facts['disk_free_nbytes'])} free" if facts["disk_free_nbytes"] is not None else ""
    yield f"disk     {human(facts['disk_nbytes'])} in {counted(target['num_files'], 'file')}{free}"
    if time := facts["time"]:
        yield (f"time     {duration(time['seconds_estimated'])} (reads {human(time['read_nbytes_per_second'])}/s, "
               f"copies {human(time['copied_nbytes_per_second'])}/s, measured on {human(time['nbytes_tried'])})")
    if copied := facts["copied"]:
        more = f" and {len(copied) - _MAX_LISTED} more" if len(copied) > _MAX_LISTED else ""
        yield from wrapped(f"{', '.join(map(shown, copied[:_MAX_LISTED]))}{more}", "along    ")
    yield from note_lines(facts)


@dataclass(frozen=True, repr=False)
class Result(Reported):
    """A conversion that ended well; the destination is durable."""

    conversion: Conversion
    seconds: float
    peak_nbytes: int
    """Highest resident set of this process."""
    io: Mapping[str, int]
    """Bytes that the kernel counted during the run (proc_pid_io(5)): rchar, wchar, read_bytes, write_bytes."""
    done: Done

    @property
    def already_done(self) -> bool:
        """True where the destination held this very output before, and was not to be made anew."""
        return self.done.was_finished and not self.conversion.options.overwrite

    @property
    def facts(self) -> dict[str, Any]:
        """The plan and its outcome, as JSON; sizes in bytes."""
        conversion, done, moved = self.conversion, self.done, self.done.moved
        outcome = {"seconds": round(self.seconds, 3), "peak_nbytes": self.peak_nbytes, "num_files_kept": done.num_kept,
                   "num_parts_kept": done.num_parts_kept,
                   "leftovers": list(map(str, done.leftovers)), "num_digests": done.num_digests,
                   "nbytes_cloned": moved.cloned, "nbytes_copied": moved.copied, "nbytes_strided": moved.strided,
                   "num_overflowed": moved.num_overflowed, "io": dict(self.io), "verified": conversion.options.verify,
                   "next": self._next_step.command}
        return as_json(conversion) | outcome | ({"already_done": True} if self.already_done else {})

    @property
    def lines(self) -> tuple[str, ...]:
        """Summary of the run, for a person."""
        return (*(self._done_lines() if self.already_done else self._summary()), *self._next_lines())

    def _summary(self) -> Iterator[str]:
        conversion, done, moved = self.conversion, self.done, self.done.moved
        memory, nbytes = conversion.memory, conversion.nbytes
        yield f"done     {shown(conversion.options.destination)}"
        yield (f"         {counted(conversion.num_files, 'file')}, {human(nbytes)} in {self.seconds:.1f} s "
               f"({human(nbytes / max(self.seconds, 1e-9))}/s), durable")
        yield (f"memory   peak {human(self.peak_nbytes)}, {human(memory.projected)} projected, "
               f"{human(memory.allowed)} allowed")
        yield from layers_lines(as_json(conversion))
        yield from (f"left     {shown(path)}: the old checkpoint could not be removed" for path in done.leftovers)
        if done.num_kept or done.num_parts_kept:
            parts = f" and {done.num_parts_kept} parts of optimizer files" if done.num_parts_kept else ""
            yield f"resumed  {counted(done.num_kept, 'file')}{parts} kept from an earlier attempt, each with its digest"
        yield f"moved    {human(moved.cloned)} cloned, {human(moved.copied)} copied, {human(moved.strided)} rearranged"
        num_without = conversion.plan.target.num_files - done.num_kept - done.num_digests
        if num_without > 0:
            yield (f"digests  {counted(num_without, 'file')} without one" + (
                ", sharing blocks with SRC (--digests all reads them)" if moved.cloned else ""))
        if moved.num_overflowed:
            yield (f"overflow {moved.num_overflowed} weights were too large for {conversion.options.dtype} and are "
                   f"infinite now; choose another --dtype")
        if conversion.options.verify:
            yield "verified every weight, header and file, before the commit: all equal"

    def _done_lines(self) -> Iterator[str]:
        options = self.conversion.options
        proof = "and equals the source" if options.verify else "`verify` proves it"
        yield (f"done     {shown(options.destination)} holds this conversion already, complete; {proof}, "
               f"--overwrite makes it anew")

    @property
    def _next_step(self) -> NextStep:
        """The step that a user wants to take next, in a folder that was written."""
        return self.conversion.target.next_step(self.conversion.output.destination)

    def _next_lines(self) -> Iterator[str]:
        """The next commands, each on a line that can be copied."""
        options, step = self.conversion.options, self._next_step
        if not options.verify:
            words = map(shell_word, (options.source, self.conversion.output.destination))
            yield f"verify   stream-reshard verify {' '.join(words)}"
        yield f"{step.word:<8} {step.place}"
        yield step.command
