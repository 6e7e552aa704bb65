"""The plan of a training state: the states of a source against those of a target, proved before anything is written.

Each group of parameters is a job, which writes parts of the files of all ranks that hold its states.
"""
from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator

from stream_reshard.errors import StreamReshardError
from stream_reshard.formats.layout import Fill, Group, Slice, offset_in
from stream_reshard.formats.nanotron.training.layout import StateLayout
from stream_reshard.model.box import Box, packing_fault, tiling_fault
from stream_reshard.plan.plan import Plan
from stream_reshard.plan.proof import described


def make_state_plan(source: StateLayout, target: StateLayout, values_digest: str) -> Plan:
    """Overlap the states of two checkpoints, and prove that every byte of a state is written exactly once.

    `values_digest`: of all that the files hold beside states. Raises StreamReshardError where the proof fails: a fault
    of the layouts, not of the user.
    """
    digest, dtypes, sizes, spans = hashlib.sha256(values_digest.encode()), Counter[str](), array("Q"), []
    last_of: dict[Hashable, Group] = {}
    faults: list[str] = []
    for group in target.groups():
        key = source.group(group.position).storage_class, group.storage_class
        if key not in last_of:
            faults += state_faults(source, target, group)
            digest.update(json.dumps([[described(layout, number) for number in group.numbers]
                                      for layout in (source, target)]).encode())
        last_of[key] = group
        origins = [(part.path, part.tensors[0].begin) for part in source.files_of(group)]
        parts = target.files_of(group)
        places = [(part.path, part.size, part.tensors[0].begin) for part in parts]
        digest.update(repr((key, origins, places)).encode())
        spans.append(min(origins))
        sizes.append(sum(part.nbytes for part in parts))
        for tensor in (tensor for part in parts for tensor in part.tensors):
            dtypes[tensor.dtype] += tensor.nbytes
    for group in last_of.values():
        faults += state_faults(source, target, group)
    if faults:
        raise StreamReshardError("this is a fault of stream_reshard, nothing was written: "
                                 + "; ".join(faults[:5]) + "; please report it")
    order = array("I", sorted(range(len(spans)), key=spans.__getitem__))
    return Plan(source, target, order, array("I", range(len(order))), target.nbytes, max(sizes), {}, dict(dtypes),
                digest.hexdigest())


def state_faults(source: StateLayout, target: StateLayout, group: Group) -> Iterator[str]:
    """Elements of a group's parts that are not written exactly once, or of its states not read exactly once."""
    places: dict[tuple[str, str], list[Box]] = defaultdict(list)
    for number in group.numbers:
        parameter, targets = target.model.parameter(number), target.slices_of(number)
        if source.dtype_at(number) != target.dtype_at(number):
            yield f"{parameter.name}: a state is cast"
        for layout, slices in ((source, source.slices_of(number)), (target, targets)):
            if fault := tiling_fault([part.region for part in slices], parameter.whole):
                yield f"{parameter.name} in {layout.root}: {fault}"
        parts: tuple[Slice | Fill, ...] = (*targets, *target.copies_of(number), *target.fills_of(number))
        for part in parts:
            places[part.tensor.file, part.tensor.key].append(part.place)
    shape = target.shape_of(group.position)
    for holder, file in zip(target.holders_of(group.position), target.files_of(group)):
        for tensor in file.tensors:
            boxes = places.pop((file.path, tensor.key), [])
            fault = packing_fault(boxes, Box.whole(shape), math.prod(tensor.shape)) or next(
                ("a place is out of its stretch" for box in boxes if offset_in(shape, box.start) < holder.start
                 or offset_in(shape, tuple(n - 1 for n in box.stop)) >= holder.stop), None)
            if fault:
                yield f"{file.path}: {tensor.key}: {fault}"
    if places:
        yield f"{target.model.parameter(group.numbers[0]).name}: its files are not those of its group"
