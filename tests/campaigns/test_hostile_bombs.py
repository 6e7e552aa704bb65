"""Headers, indexes and configs that cost whoever parses them: refused at once, within the limit on memory."""
import pytest
from running import STATUS, WATCHED, watched
from sources import INDEX, make_source, raw_file

from stream_reshard.machine import memory

MEASURED = STATUS + """from stream_reshard import errors
from stream_reshard.storage import header, small_files
header.parse_header("x", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 62)
root, before = pathlib.Path(sys.argv[1]), status("VmRSS")
with contextlib.suppress(errors.SourceError):
    found = small_files.read_json(root, "json") if sys.argv[2] == "json" else header.read_header(root, "header")
print(status("VmHWM") - before, file=sys.stderr)"""


def filled(frame, unit, nbytes):
    """A text of about `nbytes`: the frame, with `unit` in it many times; `%x` in that is a number."""
    numbers = range(max(1, (nbytes - len(frame)) // len(unit.replace("%x", "00000") + ",")))
    return (frame % ",".join(unit.replace("%x", f"{i:05x}") for i in numbers)).encode()


MAP, NONE = '{"weight_map":{%s}}', '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
DIMS = '{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}}'
HEADERS = {
    "tensors": ("{%s}", '"%x":' + NONE), "long names": ("{%s}", f'"{"n" * 9999}%x":{NONE}'), "dims": (DIMS, "0"),
    "wide letters": ("{%s}", f'"{"n" * 9999}\U0001f600%x":{NONE}'),
    "metadata": ('{"__metadata__":{%s},"a":' + NONE + "}", '"%x":""'),
    "huge dims": (DIMS, str(2**47 + 1)), "offsets": (DIMS.replace("0,0", "%s").replace("%s", "1", 1), "0"),
    "keys": ("{%s}", '"%x":0'),
    "digits": (DIMS, "9" * 4300), "lists": ('{"a":[%s]}', "[]"),
    "deep lists": ('{"\U0001f600":[%s]}', "[" * 99 + "]" * 99),
    "deep objects": ('{"a":[%s]}', '{"":' * 20 + "0" + "}" * 20), "floats": ('{"a":[%s]}', "1e9")}
INDEXES = {"names": (MAP, '"%x":"a.safetensors"'), "shards": (MAP, '"%x":"%x.safetensors"'),
           "paths": (MAP, '"%x":"../%x"'),
           "nothing": (MAP, '"%x":[[],[]]'), "deep": (MAP, '"%x":' + "[" * 50 + "]" * 50)}
"""Texts that cost whoever parses them: (frame, what stands in it many times)."""


def write_index(root, text):
    (root / "model.safetensors").rename(root / "a.safetensors")
    (root / INDEX).write_bytes(text)


def write_shards(root, text):
    write_index(root, filled(MAP, '"%x":"%x.safetensors"', 1100))
    for i in range(40):
        (root / f"{i:05x}.safetensors").write_bytes(raw_file(text))


WRITE = {"header": lambda root, text: (root / "model.safetensors").write_bytes(raw_file(text)), "index": write_index,
         "shards": write_shards,
         "config": lambda root, text: (root / "config.json").write_bytes(
             b'{"a":%s,%s' % (text, (root / "config.json").read_bytes()[1:]))}
QUICK = [("header", "tensors", 0, "64MiB"), ("header", "metadata", 0, "64MiB"), ("header", "huge dims", 0, "64MiB"),
         ("header", "digits", 0, "64MiB"), ("header", "deep lists", 0, "64MiB"), ("index", "names", 0, "64MiB"),
         ("index", "deep", 0, "64MiB"), ("index", "paths", 10_480_000, "64MiB"), ("shards", "tensors", 0, "64MiB"),
         ("header", "deep lists", 24_999_000, "512MiB"), ("config", "deep lists", 10_480_000, "64MiB")]
EACH = [*[("header", name, 0, "64MiB") for name in HEADERS], *[("index", name, 0, "64MiB") for name in INDEXES],
        ("header", "tensors", 24_999_000, "64MiB"),
        *[("index", name, 10_480_000, limit) for name in INDEXES for limit in ("64MiB", "512MiB")],
        *[("shards", name, 0, "64MiB") for name in ("deep lists", "digits", "long names")]]
"""(file, text, its length, limit); 0 is as much as is still parsed. One of each kind is quick."""
BOMBS = [*QUICK, *(pytest.param(*bomb, marks=pytest.mark.heavy) for bomb in EACH if bomb not in QUICK)]


@pytest.fixture(scope="module")
def most(tmp_path_factory):
    """Bytes of a header, or an index, that are still parsed under a limit of 64 MiB."""
    WRITE["header"](root := make_source(tmp_path_factory.mktemp("most") / "hf"), b" " * 20_000_000)
    line = watched(WATCHED, "plan", root, "--max-memory", "64MiB")[1][0]
    return int(line.partition("the limit is ")[2].partition(";")[0]) * 95 // 100


@pytest.mark.parametrize("what, name, nbytes, limit", BOMBS, ids=str)
def test_bomb(tmp_path, most, what, name, nbytes, limit):
    """A source that says too much is refused at once, in few words, within the limit on memory."""
    WRITE[what](make_source(tmp_path / "hf"), filled(*(HEADERS | INDEXES)[name], nbytes or most))
    code, lines, seconds, peak = watched(WATCHED, tmp_path / "hf", tmp_path / "nt", "--max-memory", limit)
    assert peak <= memory.parse_nbytes(limit) and seconds < 3, f"{seconds:.1f} s, {peak / 2**20:.1f} MiB"
    assert code == (6 if "--max-memory" in "".join(lines) else 3) and lines and not (tmp_path / "nt").exists(), (
        code, lines[-1:])
    assert len(lines) <= 51 and all(line.isprintable() and len(line) < 700 for line in lines), (
        len(lines), max(map(len, lines)))


@pytest.mark.parametrize("what", ["header", "json"])
@pytest.mark.parametrize("name", ["deep lists", *(
    pytest.param(name, marks=pytest.mark.heavy) for name in HEADERS if name != "deep lists")])
def test_what_parsing_takes(tmp_path, what, name):
    """No byte of JSON takes more memory than the limits on what is parsed reckon with."""
    text = filled(*HEADERS[name], 2_000_000)
    (tmp_path / what).write_bytes(raw_file(text) if what == "header" else text)
    factor = watched(MEASURED, tmp_path, what)[3] / len(text)
    print(f"{what}, {name}: {factor:.1f} bytes per byte")
    assert factor <= memory._PARSED_PER_BYTE
