"""Mutated headers are read as three readers read them, or refused in a line."""
import json
import math
import random
import re
from collections import Counter
from multiprocessing import get_context

import psutil
import pytest
from headers import WITH_METADATA, assert_same_as_library, library_accepts, mutated, one, two
from sources import CONFIG, make_tensors, raw_file, shapes_of, tensor_bytes

from stream_reshard.errors import SourceError
from stream_reshard.storage.header import parse_header

FORMAT = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
          "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
WORD = re.compile(r'[ \t\n\r]*("(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
                  r'|0|[1-9][0-9]*|[][{},:])[ \t\n\r]*')
"""The words of the subset of JSON that the format uses."""


def unescaped(text):
    """What a JSON string means. Raises UnicodeError for half a surrogate pair."""
    plain = re.sub(r"\\(?:u(....)|(.))", lambda m: chr(int(m[1], 16)) if m[1] else
                   dict(zip("bfnrt", "\b\f\n\r\t")).get(m[2], m[2]), text[1:-1])
    return plain.encode("utf-16", "surrogatepass").decode("utf-16")


def value_of(words):
    """The value at the end of `words`, which stand in reverse order; it is taken away.

    Raises ValueError or IndexError.
    """
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
    """{name: (dtype, shape, bytes)} as the format's text defines a file, None where it is none.

    No code of the package has a part in it, nor json. As the package does, it asks for a tensor, for whole bytes, and
    for sizes below 2**48.
    """
    try:
        text = header.decode()
        words, found, end = WORD.findall(text)[::-1], {}, 0
        table = value_of(words)
        if text[0] != "{" or WORD.sub("", text) or words:
            return None
        if {type(v) for v in table.pop("__metadata__", {}).values()} - {str}:
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


def seed_headers():
    """(header, weight) of small files, of a rank of Nanotron, of Llama shards with one and with 32 layers."""
    fields = {"version": "1.5", "unsharded_shape": "(4, 2)",
              "local_global_slices_pairs": "None,None,None#0,2,None|None,None,None"}
    rank = json.dumps({"__metadata__": fields, "data": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}})
    llamas = [tensor_bytes(make_tensors(shapes_of("llama", CONFIG | {"num_hidden_layers": n}, False))) for n in (1, 32)]
    return [*[(text.encode(), 8) for text in (one(), two(), two("[4,8]", "[0,4]"), rank, WITH_METADATA % '{"k":"v"}')],
            (b"{}", 1), (b'{"__metadata__":{}}', 1), (one(shape="[0,4]", offsets="[0,0]").encode(), 4),
            *[(file[8:8 + int.from_bytes(file[:8], "little")], often) for file, often in zip(llamas, (8, 0.05))]]


def fuzzed(seed, number):
    """(counts by (strict reader, safetensors, package) accept it, violations) of `number` mutants.

    Memory that grew is a violation, too.
    """
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


@pytest.mark.parametrize("number", [10_000, pytest.param(1_000_000, marks=pytest.mark.heavy)])
def test_mutated_headers(number):
    """The package accepts what safetensors and the format's text both accept, and finds the same bytes in it.

    It refuses the rest with SourceError and a few printable words; memory does not grow.
    """
    with get_context("fork").Pool(2) as pool:
        counts, wrong = zip(*pool.starmap(fuzzed, [(number, number // 2), (-number, number // 2)]))
    total = sum(counts, Counter())
    print(f"{number} tried:", ", ".join(f"{n} of (strict, library, package) {key}" for key, n in sorted(total.items())))
    assert not any(wrong), wrong
    assert total[True, True, True] > number / 10 and total[False, True, False] > number / 1000, total
