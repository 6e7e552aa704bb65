"""Laws of the smallest parts, over values that hypothesis chooses: the same ones in every run."""
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_reshard.formats.nanotron.rules import assign_stages
from stream_reshard.formats.nanotron.training.zero import stretch_of
from stream_reshard.formats.nanotron.weight_files import parse_pairs, parse_path, parse_shape
from stream_reshard.machine.memory import human, parse_nbytes
from stream_reshard.model.box import Box, boxes_of_range, has_duplicates, tiling_fault
from stream_reshard.model.names import Templates, indices_of
from stream_reshard.model.parameters import parse_token_id
from stream_reshard.model.topology import part_of
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.header import header_of, pack_header, parse_header, placed, planned_file
from stream_reshard.storage.json_stream import JsonReader
from stream_reshard.storage.json_text import strict_json

settings.register_profile("same", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("same")

EXTENTS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def boxes(draw, shape):
    """A box in an array of this shape; it may be empty."""
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


@st.composite
def shape_and_boxes(draw, number):
    shape = draw(EXTENTS)
    return tuple(shape), [draw(boxes(shape)) for _ in range(number)]


def mask(shape, box):
    """Which elements a box holds, by numpy."""
    array = np.zeros(shape, bool)
    array[tuple(map(slice, box.start, box.stop))] = True
    return array


@given(shape_and_boxes(2))
def test_overlap_is_what_both_hold(case):
    shape, (one, other) = case
    common, want = one.overlap(other), mask(shape, one) & mask(shape, other)
    assert common == other.overlap(one)
    assert np.array_equal(mask(shape, common), want) if common else not want.any()
    assert one.overlap(one) == (one if one.num_elements else None)
    assert one.contains(other) == (not (mask(shape, other) & ~mask(shape, one)).any())


@given(shape_and_boxes(2))
def test_a_box_seen_from_another_is_moved_and_nothing_else(case):
    _, (one, other) = case
    assert one.seen_from(one).start == (0,) * len(one.start)
    moved = one.seen_from(other)
    assert moved.shape == one.shape and moved.seen_from(Box.whole((0,) * len(one.start)).seen_from(other)) == one


@given(shape_and_boxes(3))
def test_a_hull_is_the_smallest_box_around_boxes(case):
    _, several = case
    hull = Box.hull(several)
    assert all(hull.contains(box) for box in several)
    for dim in range(len(hull.start)):
        assert hull.start[dim] == min(box.start[dim] for box in several)
        assert hull.stop[dim] == max(box.stop[dim] for box in several)


@given(shape_and_boxes(1), st.integers(1, 30), st.randoms(use_true_random=False))
def test_blocks_make_up_the_box_in_the_order_of_the_array(case, max_elements, random):
    shape, (box,) = case
    order = list(range(len(shape)))
    random.shuffle(order)
    blocks = list(box.blocks(max_elements, order))
    assert tiling_fault(blocks, box) is None
    numbers = np.arange(math.prod(box.shape)).reshape([box.shape[dim] for dim in order])
    seen = [numbers[tuple(slice(block.start[dim] - box.start[dim], block.stop[dim] - box.start[dim])
                          for dim in order)].ravel() for block in blocks]
    assert np.array_equal(np.concatenate([*seen, []]), np.arange(math.prod(box.shape)))
    assert all(0 < block.num_elements <= max_elements for block in blocks)


@given(shape_and_boxes(3))
def test_a_tiling_takes_every_element_once(case):
    shape, several = case
    counts = sum(mask(shape, box).astype(int) for box in several)
    assert (tiling_fault(several, Box.whole(shape)) is None) == bool((counts == 1).all())


@given(st.lists(st.integers(-2**63, 2**63 - 1), max_size=300))
def test_twins_are_found(numbers):
    assert has_duplicates(numbers) == (len(set(numbers)) < len(numbers))


TEMPLATES = ["embedding", "layers.{layer}.norm", "layers.{layer}.experts.{expert}.up", "layers.{layer}.up"]


@given(st.integers(1, 10**6), st.integers(1, 4096), st.sampled_from(range(len(TEMPLATES))), st.data())
def test_a_name_leads_back_to_its_template(num_layers, num_experts, which, data):
    extents = {"layer": num_layers, "expert": num_experts}
    count = math.prod(extents[field] for field in extents if f"{{{field}}}" in TEMPLATES[which])
    instance = data.draw(st.integers(0, count - 1))
    name = TEMPLATES[which].format(**indices_of(TEMPLATES[which], extents, instance))
    assert Templates(TEMPLATES, extents).find(name) == (which, instance)


@given(st.text(alphabet="layersnormupxt.0123456789{}_\u0661", max_size=40))
def test_any_other_name_is_found_by_nobody(name):
    extents = {"layer": 20, "expert": 3}
    found = Templates(TEMPLATES, extents).find(name)
    if found is not None:
        template = TEMPLATES[found[0]]
        assert template.format(**indices_of(template, extents, found[1])) == name


UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
         "TiB": 2**40}


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from([str, str.lower, str.upper]))
def test_sizes_are_read_as_they_are_written(number, unit, spell):
    assert parse_nbytes(f" {number} {spell(unit)} ") == number * UNITS[unit]
    shown = human(number * UNITS[unit])
    assert abs(parse_nbytes(shown) - number * UNITS[unit]) <= 0.05 * number * UNITS[unit] + 1


KEYS = st.text(min_size=1, max_size=20).filter(lambda key: key != "__metadata__" and key.isprintable())
TENSORS = st.dictionaries(KEYS, st.tuples(st.sampled_from(sorted(set(ITEMSIZE) - {"C64", "F8_E8M0"})),
                                          st.lists(st.integers(1, 9), max_size=4).map(tuple)), min_size=1, max_size=8)


@given(TENSORS, st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3), st.integers(0, 400))
def test_a_header_is_read_as_it_was_packed(tensors, metadata, shift):
    """By our reading and by safetensors', both of which must accept it."""
    file = planned_file("f", [(key, *kind) for key, kind in tensors.items()], metadata)
    file = placed(file, "f", file.tensors[0].begin + 8 * shift)
    text = header_of(file)
    assert len(text) == file.tensors[0].begin and len(text) % 8 == 0
    assert text == pack_header([(tensor.key, tensor.dtype, tensor.shape) for tensor in file.tensors], metadata, len(text))
    assert parse_header("f", text[8:], file.nbytes) == file


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_json_in_pieces_is_json(value, is_ascii, indent):
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    try:
        want = strict_json(text)
    except ValueError:
        with pytest.raises(ValueError):
            dict(JsonReader(io.BytesIO(text), 10**6, 10**6).entries())
        return
    assert want == value == dict(JsonReader(io.BytesIO(text), 10**6, 10**6).entries())


@given(st.integers(1, 64), st.integers(1, 64))
def test_parts_of_a_dim_make_it_up(num_parts, each):
    parts = [part_of(num_parts * each, num_parts, index) for index in range(num_parts)]
    assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])] and parts[-1][1] == num_parts * each
    assert {b - a for a, b in parts} == {each}


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.integers(1, 9))
def test_stages_never_go_back(costs, num_stages):
    stages = assign_stages(costs, num_stages)
    assert stages[0] == 0 and all(b - a in (0, 1) for a, b in zip(stages, stages[1:]))
    assert len(stages) == len(costs) and stages[-1] < num_stages + (sum(costs) == 0)


@given(shape_and_boxes(1))
def test_slices_are_read_as_nanotron_writes_them(case):
    """The text forms of Nanotron (nanotron/parallel/parameters.py), also those of numpy 2."""
    shape, (box,) = case
    text = "|".join(f"{a},{b},None" for a, b in zip(box.start, box.stop))
    local = "|".join("None,None,None" for _ in shape)
    if box.num_elements:
        assert parse_pairs(f"{local}#{text}", box.shape, shape) == ((Box.whole(box.shape), box),)
    assert parse_shape(str(shape)) == parse_shape(str(shape).replace("(", "(np.int64(", 1).replace(",", "),", 1)) == shape


@given(st.text(alphabet="model_/.safetnspkr-0123456789of\n", max_size=80))
def test_a_path_is_one_of_nanotrons_or_refused(path):
    from stream_reshard.errors import SourceError
    try:
        name, rank = parse_path(path)
    except SourceError:
        return
    assert path.startswith("model/model/") and name and (rank is None or rank.pp < rank.num_pp)


@given(JSON)
def test_a_token_id_is_read_back_or_refused(value):
    try:
        ids = parse_token_id(value)
    except ValueError:
        return
    assert json.loads(json.dumps(ids)) == value


@given(EXTENTS, st.data())
def test_a_range_of_a_flattened_array_is_its_boxes_one_after_the_other(shape, data):
    array = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop, found = data.draw(st.integers(start, array.size)), []
    for box in boxes_of_range(tuple(shape), start, stop):
        held = array[tuple(map(slice, box.start, box.stop))].ravel().tolist()
        offset, count = box.flat_in(tuple(shape))
        assert held == list(range(offset, offset + count))
        found += held
    assert found == list(range(start, stop))


@given(st.integers(1, 300), st.integers(1, 70))
def test_stretches_are_those_of_nanotron(num_elements, num_ranks):
    """The rule as nanotron/optim/zero.py states it: the last ranks have one element less."""
    longest = (num_elements - 1) // num_ranks + 1
    sizes = [longest - (rank >= num_ranks - (longest * num_ranks - num_elements)) for rank in range(num_ranks)]
    ends = np.cumsum(sizes).tolist()
    assert [stretch_of(num_elements, num_ranks, rank) for rank in range(num_ranks)] == list(zip([0, *ends], ends))
