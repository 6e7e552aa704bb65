"""Reading JSON piece by piece finds what parsing it at once finds, and refuses what that refuses, however it is cut.
NaN and keys that occur twice are taken as Python's reader takes them; what they mean is for others to say."""
import io
import json
import random
from collections import Counter

import pytest
from headers import mutated

from stream_reshard.storage import json_stream
from stream_reshard.storage.json_stream import JsonReader, TooLong

SEEDS = [
    b'{"metadata": {"total_size": 12}, "weight_map": {"a": "x.safetensors", "b.0": "y.safetensors"}}',
    b'{"weight_map":{"a":"x","b":"x","c":"y","d":"y"},"n":[1,-2.5,1e9,null,true,{"k":[]}],"z":""}',
    b'{ "weight_map" :\n{ "a" :\t"x" ,\r\n "b" : "y" } }', b'{"weight_map":{},"a":{}}', b"{}", b" { } ",
    '{"weight_map":{"\u00e9":"\U0001f600","\\u00e9x":"\\ud83d\\ude00","\\ud800":"\\"\\\\\\n"}}'.encode(),
    b'{"weight_map":{"a":["x"],"b":{"c":"d"},"c":5,"d":-0.0,"e":null}}', b'{"a":"b","weight_map":5}',
    b'{"weight_map":{"a":"x"},"more":123456789012345678901234567890}']
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\x00", b"\xff", b"\xc3", b"1", b"-", b".", b"e",
          b"NaN", b"Infinity", b"null", b'"a"', b'"a":"x"', b'"weight_map"', b"{}", b"[[[[", b"\\ud800", b"9" * 4301]
SPELLINGS = [(b",", b" , "), (b":", b"\t:\r\n"), (b'"a"', b'"\\u0061"'), (b'"', b"'"), (b"}", b",}")]


def in_pieces(text):
    """The object as JsonReader finds it, its map entry by entry."""
    reader = JsonReader(io.BytesIO(text), 10**6, 10**6)
    if reader.next() != "{":
        value = reader.value()
    else:
        value = {}
        for key in reader.keys():
            if key == "weight_map" and reader.next() == "{":
                value[key] = dict(reader.entries())
            elif reader.next() == "[":
                value[key] = list(reader.items())
            else:
                value[key] = reader.value()
    if reader.next():
        raise ValueError("more")
    return value


def at_once(text):
    """The same, parsed as a whole."""
    try:
        return json.loads(text.decode())
    except RecursionError as error:
        raise ValueError(str(error)) from error


def told(function, text):
    """(whether it is accepted, what is found, as text: NaN and -0.0 are told apart)."""
    try:
        return True, repr(function(text))
    except ValueError as error:
        return False, len(str(error)) > 400


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**16])
def test_mutated_texts(monkeypatch, chunk):
    """Of 4,000 texts, both readers accept the same, and find the same in them."""
    monkeypatch.setattr(json_stream, "_CHUNK_NBYTES", chunk)
    rng, counts = random.Random(chunk), Counter()
    for text in SEEDS:
        assert told(in_pieces, text) == told(at_once, text) and told(in_pieces, text)[0]
    for _ in range(4000):
        text = mutated(rng, rng.choice(SEEDS), TOKENS, SPELLINGS)
        mine, theirs = told(in_pieces, text), told(at_once, text)
        assert mine == theirs, (text, mine, theirs)
        counts[mine[0]] += 1
    assert min(counts.values()) > 500, counts


def test_long_texts_are_read_in_pieces():
    table = {f"model.layers.{i}.weight": f"model-{i % 7}.safetensors" for i in range(20_000)}
    text = json.dumps({"a": 1, "weight_map": table, "b": [2]}).encode()
    reader = JsonReader(io.BytesIO(text), len(text), 1000)
    assert {key: dict(reader.entries()) if key == "weight_map" else reader.value()
            for key in reader.keys()} == {"a": 1, "weight_map": table, "b": [2]}
    assert reader.next() == ""


LIMITS = [
    ("the whole", b'{"a":1}' + b" " * 2**17, 2**16, 2**16), ("a value", b'{"a":[%s0]}' % (b"0," * 2**19), 2**22, 2**16),
    ("a name", b'{"%s":0}' % (b"a" * 2**20), 2**22, 2**16), ("an open text", b'{"a":"' + b"x" * 2**20, 2**22, 2**16)]


@pytest.mark.parametrize("text, whole, value", [pytest.param(*row[1:], id=row[0]) for row in LIMITS])
def test_limits(text, whole, value):
    reader = JsonReader(io.BytesIO(text), whole, value)
    with pytest.raises(TooLong, match="65536"):
        for _ in reader.keys():
            reader.value()
        reader.next()
