"""Hostile headers and indexes: read as three readers read them, or refused in a line; names in them lead nowhere."""
import io
import json
import math
import os
import random
import re
import signal
import socket
import sys
import traceback
from collections import Counter, namedtuple
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from sources import CONFIG, INDEX, edit_text, make_source, make_tensors, raw_file, shapes_of, tensor_bytes
from test_header import WITH_METADATA, assert_same_as_library, library_accepts, one, two
from trees import call, replace

from stream_reshard.errors import SourceError
from stream_reshard.header import parse_header

ONE, TWO, NORM = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.norm.weight"

FORMAT = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
          "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
WORD = re.compile(r'[ \t\n\r]*("(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"|0|[1-9][0-9]*|[][{},:])[ \t\n\r]*')
"""The words of the subset of JSON that the format uses."""


def unescaped(text):
    """What a JSON string means. Raises UnicodeError for half a surrogate pair."""
    plain = re.sub(r"\\(?:u(....)|(.))", lambda m: chr(int(m[1], 16)) if m[1] else
                   dict(zip("bfnrt", "\b\f\n\r\t")).get(m[2], m[2]), text[1:-1])
    return plain.encode("utf-16", "surrogatepass").decode("utf-16")


def value_of(words):
    """The value at the end of `words`, which stand in reverse order; it is taken away. Raises ValueError or IndexError."""
    word = words.pop()
    if word not in ("[", "{"):
        return unescaped(word) if word[0] == '"' else int(word)
    items, closing = [], {"[": "]", "{": "}"}[word]
    comma = words.pop() if words[-1] == closing else ","
    while comma == ",":
        key, colon = (value_of(words), words.pop()) if closing == "}" else (str(len(items)), ":")
        items.append((key, value_of(words)))
        comma = words.pop()
        if colon != ":" or comma not in ("," + closing) or type(key) is not str:
            raise ValueError("neither a list nor an object")
    if len(dict(items)) < len(items):
        raise ValueError("a key twice")
    return dict(items) if closing == "}" else [value for _, value in items]


def strictly(header, data):
    """{name: (dtype, shape, bytes)} as the format's text defines a file, None where it is none. No code of the package
    has a part in it, nor json. As the package does, it asks for a tensor, for whole bytes, and for sizes below 2**48."""
    try:
        text = header.decode()
        words, found, end = WORD.findall(text)[::-1], {}, 0
        table = value_of(words)
        if text[0] != "{" or WORD.sub("", text) or words or {type(v) for v in table.pop("__metadata__", {}).values()} - {str}:
            return None
        for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            (first, last), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
            sizes = type(shape) is list and all(type(n) is int and n < 2**48 for n in [*shape, first, last])
            if not sizes or len(entry) > 3 or first != end or last - first != math.prod(shape) * FORMAT[dtype]:
                return None
            found[name], end = (dtype, shape, data[first:last]), last
        return found if found and end == len(data) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


LEVELS = [re.compile(rb".", re.S), re.compile(rb'"[^"]*"|[0-9]+|[A-Za-z]+|\s+|.', re.S), re.compile(rb'"[^"]*": ?\{[^{}]*\}|.', re.S)]
TOKENS = [b"0", b"1", b"-", b"9", b"1e9", b"NaN", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b" ", b"\n", b"{}",
          b"\\u0000", b"\\ud800", b"\xff", b"\0", b'"a"', b'"F32"', b'"BF16"', b'"F8_E4M3"', b'"F4"', b'"dtype"', b'"x"', b"-0",
          b'"__metadata__"', b'"__metadata__":{"k":"v"},', b'"__metadata__":null,', b"4.0", b"00", b"%d" % 2**48, b"%d" % 2**64]
SPELLINGS = [(b"BF16", b"I16"), (b"F32", b"U32"), (b"a", b"\\u0061"), (b"[", b"[ "), (b":", b" :\n"), (b"1]", b"1,1]"), (b"4]", b"%d]" % 2**48)]


def mutated(rng, text, tokens=TOKENS, spellings=SPELLINGS):
    """One to three edits of bytes, words or tensors: one is put in, left out, doubled, exchanged with or overwritten by
    another, changed by a bit, counted up or down; or the whole is spelled in another way."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pieces = rng.choice(LEVELS).findall(text) or [b"{"]
        here, there = (max(rng.choices(range(len(pieces)), k=k), key=lambda i: len(pieces[i])) for k in (3, 12))
        piece, kind = pieces[here], rng.randrange(8)
        if kind < 2:
            pieces[here:here + kind] = [rng.choice(tokens)]
        elif kind == 2:
            pieces[here:here + 1] = [piece] * rng.choice((0, 2))
        elif kind < 5:
            pieces[here], pieces[there] = pieces[there], pieces[here if kind == 3 else there]
        elif kind == 5:
            pieces[here] = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
        elif kind == 6 and (numbers := [i for i, piece in enumerate(pieces) if piece.isdigit() and len(piece) < 99]):
            here = rng.choice(numbers)
            pieces[here] = b"%d" % max(0, int(pieces[here]) * rng.choice((0, 1, 1, 2)) + rng.choice((-1, 0, 1, 2, 4)))
        text = b"".join(pieces) if kind < 7 else text.replace(*rng.choice(spellings), rng.choice((1, 9)))
    return text


def seed_headers():
    """(header, weight) of small files, of a rank of Nanotron, of Llama shards with one and with 32 layers."""
    fields = {"version": "1.5", "unsharded_shape": "(4, 2)", "local_global_slices_pairs": "None,None,None#0,2,None|None,None,None"}
    rank = json.dumps({"__metadata__": fields, "data": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}})
    llamas = [tensor_bytes(make_tensors(shapes_of("llama", CONFIG | {"num_hidden_layers": n}, False))) for n in (1, 32)]
    return [*[(text.encode(), 8) for text in (one(), two(), two("[4,8]", "[0,4]"), rank, WITH_METADATA % '{"k":"v"}')],
            (b"{}", 1), (b'{"__metadata__":{}}', 1), (one(shape="[0,4]", offsets="[0,0]").encode(), 4),
            *[(file[8:8 + int.from_bytes(file[:8], "little")], often) for file, often in zip(llamas, (8, 0.05))]]


def fuzzed(seed, number):
    """(counts by (strict reader, safetensors, package) accept it, violations) of `number` mutants, or what of memory grew."""
    rng, counts, wrong, pool = random.Random(seed), Counter(), [], random.Random(0).randbytes(2**17)
    seeds, weights = zip(*seed_headers())
    before = psutil.Process().memory_info().rss
    for _ in range(number):
        header, ours = mutated(rng, *rng.choices(seeds, weights)), None
        ends = [int(end) for end in re.findall(rb"(\d{1,9}) ?\]", header)] if rng.random() < 0.9 else [8]
        data = pool[:max((end for end in ends if end <= len(pool)), default=0)]
        content = raw_file(header, data)
        try:
            ours = parse_header("x", header, len(content))
            assert_same_as_library(ours, content)
        except SourceError as error:
            wrong += [(header, error)] * (not str(error).isprintable() or len(str(error)) > 400)
        except Exception as error:
            wrong.append((header, error))
        strict, theirs = strictly(header, data), library_accepts(content)
        mine = ours and {t.key: (t.dtype, list(t.shape), content[t.begin:t.begin + t.nbytes]) for t in ours.tensors}
        counts[strict is not None, theirs, ours is not None] += 1
        wrong += [(header, strict, theirs, mine)] * (mine != (strict if theirs else None))
    grown = psutil.Process().memory_info().rss - before
    return counts, wrong[:5] + [f"{grown} bytes"] * (grown > 64 * 2**20)


@pytest.mark.parametrize("number", [100_000, pytest.param(1_000_000, marks=pytest.mark.heavy)])
def test_mutated_headers(number):
    """The package accepts what safetensors and the format's text both accept, and finds the same bytes in it; it refuses
    the rest with SourceError and a few printable words; memory does not grow."""
    with get_context("fork").Pool(2) as pool:
        counts, wrong = zip(*pool.starmap(fuzzed, [(number, number // 2), (-number, number // 2)]))
    total = sum(counts, Counter())
    print(f"{number} tried:", ", ".join(f"{n} of (strict, library, package) {key}" for key, n in sorted(total.items())))
    assert not any(wrong), wrong
    assert total[True, True, True] > number / 10 and total[False, True, False] > number / 1000, total


SYSTEM = re.compile(r"/proc/(\d+/statm?|self/status|stat|meminfo)|/sys/fs/cgroup/(memory\.max|memory/memory\.limit_in_bytes)")
"""What a plan may open beside its source: how much memory there is, and is held."""

FOREIGN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect", "import"}
Run = namedtuple("Run", "code out err opened foreign")
"""`foreign`: what ran code of others, or could."""


def in_child(*arguments, seconds=10):
    """A command in a forked process, whose audit hook notes what it opens and could run; what hangs is killed."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.write(writing, json.dumps(_audited(arguments)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        told = stream.read()
    assert os.waitpid(pid, 0)[1] == 0, f"killed after {seconds} s"
    return Run(*json.loads(told))


def _audited(arguments):
    events, code = [], "an exception"
    sys.stdout, sys.stderr = streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe"]
    sys.addaudithook(lambda event, told: events.append((event, told)) if event == "open" or event in FOREIGN else None)
    try:
        code = call(*arguments)
    except BaseException:
        traceback.print_exc()
    opened = [os.path.abspath(os.fsencode(told[0])) for event, told in events if event == "open" and type(told[0]) is not int]
    return [code, *(stream.buffer.getvalue().decode() for stream in streams), [os.fsdecode(path) for path in opened],
            [f"{event} {told[:1]}" for event, told in events if event in FOREIGN]]


def outside(run, *roots):
    """What a run opened that is not below these folders, nor the system's word on memory; and what it could have run."""
    inside = tuple(f"{root}/" for root in roots)
    return run.foreign + [path for path in run.opened if not path.startswith(inside) and not SYSTEM.fullmatch(path)]


def refused(root, *words):
    """The plan of a source is refused with one line that holds these words, and opens nothing but what is in the source."""
    run = in_child("plan", root, "--quiet")
    assert (run.code, run.out, outside(run, root)) == (3, "", []), run
    assert run.err.startswith("error: ") and run.err[:-1].isprintable() and run.err.isascii() and len(run.err) < 700, run.err
    assert run.err[-1] == "\n" and all(word in run.err for word in words), run.err
    return run


@pytest.fixture
def source(tmp_path):
    """A source of two shards, after a first run, so that children have everything imported."""
    root = make_source(tmp_path / "hf", num_shards=2)
    assert call("plan", root, "--quiet") == 0
    return root


NAMES = [
    "../bait.safetensors", "{out}/bait.safetensors", "sub/../../bait.safetensors", "sub/../sub/bait.safetensors",
    "sub/bait.safetensors", "./bait.safetensors", "bait.safetensors/", "C:\\bait.safetensors", "\\\\srv\\bait.safetensors",
    "..\\bait.safetensors", "bait.safetensors\0", "bait.bin\0.safetensors", "bait\n.safetensors", "bait.safetensors\n",
    "\x1b[2Jbait.safetensors", "bait\x7f.safetensors", "bait.bin", "bait.pt", "bait", "bait.SAFETENSORS", "", ".", "..",
    "...safetensors", ".safetensors", ".bait.safetensors", "-bait.safetensors", "~/bait.safetensors", "$HOME.safetensors",
    "bait*.safetensors", "%2e%2e%2fbait.safetensors", "file:///bait.safetensors", "bait .safetensors", "b\u0430it.safetensors",
    "\uff42ait.safetensors", "bait\u2024safetensors", "bait\u200b.safetensors", "\u202esrosnetefas.tiab", "bait.safeten\u017fors",
    "\u0661.safetensors", "\ud800.safetensors", "/dev/zero", "/proc/self/mem", "/etc/passwd", "b" * 244 + ".safetensors",
    "b" * 4096 + ".safetensors", "b/" * 2000 + ".safetensors", None, 5, 0, True, 1.5, [], ["bait.safetensors"], {}, {"b": 1}]
"""Names of shards in an index, every one refused although a good file stands there, where the disk can have one."""


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_name_of_a_shard(tmp_path, source, name):
    name = name.format(out=tmp_path) if type(name) is str else name
    try:
        bait = Path(os.path.join(source, name))
        bait.parent.mkdir(exist_ok=True)
        bait.exists() or bait.write_bytes((source / TWO).read_bytes())
    except (TypeError, ValueError, OSError):
        pass
    edit_text(source / INDEX, f'"{TWO}"', json.dumps(name))
    run = refused(source, INDEX, "names")
    assert set(run.opened) & {f"{source}/{ONE}", os.path.abspath(os.path.join(source, str(name)))} == set()


def edited(old, new):
    return lambda root: edit_text(root / INDEX, old, new)


def instead(name, make, *arguments):
    return lambda root: replace(root / name, make, *arguments)


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.with_name("s")))
    path.with_name("s").rename(path)


def doubled(root):
    """A tensor that the index has in the second shard stands in the first one, too."""
    begin, raw = 8 + int.from_bytes((root / ONE).read_bytes()[:8], "little"), (root / ONE).read_bytes()
    entry = {"dtype": "BF16", "shape": [16], "data_offsets": [len(raw) - begin, len(raw) - begin + 32]}
    (root / ONE).write_bytes(raw_file(json.dumps(json.loads(raw[8:begin]) | {NORM: entry}), raw[begin:] + bytes(32)))


MAPS = ["null", "[]", "{}", '""', "5", "true", '["model.safetensors"]', "NaN", "1e400", "9" * 5000, '{"a":{"b":"c"}}']
OPEN, PLACE, LONG = '"weight_map": {', f'"{NORM}": "{TWO}"', '"\\u001b[2J\\n\\u202e%s"' % ("k" * 9999)
CONTENTS = [
    *[(f"map {text:.9}", lambda root, text=text: (root / INDEX).write_text('{"weight_map":%s}' % text), [INDEX]) for text in MAPS],
    ("no map", edited("weight_map", "weights"), ["weight_map"]), ("mark", edited("{\n", "\ufeff{\n"), ["JSON"]),
    ("cut", lambda root: os.truncate(root / INDEX, 300), ["JSON"]), ("behind", edited("\n}", "\n}{}"), ["JSON"]),
    ("UTF-16", lambda root: (root / INDEX).write_bytes((root / INDEX).read_text().encode("utf-16")), ["JSON"]),
    ("two maps", edited(OPEN, '"weight_map": {}, ' + OPEN), ["twice"]), ("key twice", edited(PLACE, f"{PLACE},{PLACE}"), ["twice"]),
    ("key twice, escaped", edited(PLACE, f'{PLACE},"\\u006d{NORM[1:]}":"x"'), ["twice"]),
    ("11 MiB", edited(OPEN, " " * 11 * 2**20 + OPEN), ["10485760"]), ("deep", edited(OPEN, '{"weight_map":' * 10**5), ["JSON"]),
    ("in two shards", doubled, [NORM, ONE, TWO]), ("not in the index", edited(f",\n  {PLACE}", ""), [NORM, TWO, "nothing of it"]),
    ("in no shard", edited(PLACE, f'{PLACE},"phantom":"{TWO}"'), ["phantom", TWO, "no shard"]),
    ("in the other shard", edited(PLACE, f'"{NORM}": "{ONE}"'), [NORM, ONE, TWO]),
    ("hostile key", edited(PLACE, f'{PLACE},{LONG}:"{TWO}"'), [r"\x1b[2J\n\u202e", "no shard"]),
    *[(f"shard {what}", instead(TWO, make, *arguments), [TWO]) for what, make, *arguments in [
        ("a folder", os.mkdir), ("link to a folder", os.symlink, "/tmp"), ("a pipe", os.mkfifo), ("a socket", listen),
        ("a device", os.symlink, "/dev/zero"), ("a terminal", os.symlink, "/dev/tty"), ("a loop", os.symlink, TWO),
        ("dangling", os.symlink, "nowhere"), ("no file", os.symlink, "/proc/self/maps"), ("empty", Path.touch)]],
    ("shard link to a pipe", lambda root: (os.mkfifo(root / "p"), instead(TWO, os.symlink, "p")(root)), [TWO]),
    ("shard in other case", lambda root: (root / TWO).rename(root / TWO.upper()), [TWO]),
    *[(f"index {what}", instead(INDEX, make, *arguments), ["2 shards"]) for what, make, *arguments in [
        ("a folder", os.mkdir), ("a pipe", os.mkfifo), ("endless", os.symlink, "/dev/zero")]],
    ("only a pipe", lambda root: (os.unlink(root / INDEX), os.mkfifo(root / "model.safetensors")), ["3 shards"]),
    ("config a pipe", instead("config.json", os.mkfifo), ["config.json"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in CONTENTS])
def test_index_and_shards(source, change, words):
    change(source)
    refused(source, *words)


def test_what_links_are_followed(source):
    """The same checks let a good source through, also one of links, as in a cache: shards are opened by their names."""
    (source / TWO).rename(source.parent / "blob")
    (source / TWO).symlink_to("../blob")
    run = in_child("plan", source, "--quiet")
    assert (run.code, run.err, outside(run, source)) == (0, "", [])
    assert {f"{source}/{name}" for name in (ONE, TWO, INDEX)} <= set(run.opened)
