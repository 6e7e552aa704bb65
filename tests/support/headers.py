"""Headers as text, what safetensors finds in a file, and random edits of headers and of other texts."""
import re

import pytest
import safetensors

DATA = b"01234567"


def entry(dtype="BF16", shape="[4]", offsets="[0,8]", rest=""):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{rest}}}'


def one(**fields):
    """A header with one tensor of 8 bytes, or whatever the fields make of it."""
    return f'{{"a":{entry(**fields)}}}'


def two(first="[0,4]", second="[4,8]", keys=("a", "b")):
    """A header with two tensors of 4 bytes."""
    return f'{{"{keys[0]}":{entry(shape="[2]", offsets=first)},"{keys[1]}":{entry(shape="[2]", offsets=second)}}}'


WITH_METADATA = '{"__metadata__":%s,' + one()[1:]


def rows(table):
    return [pytest.param(*row[1:], id=row[0]) for row in table]


def library_accepts(content):
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def assert_same_as_library(file, content):
    """Names, dtypes, shapes and bytes of every tensor are those that safetensors finds."""
    found = {tensor.key: (tensor.dtype, list(tensor.shape), content[tensor.begin:tensor.begin + tensor.nbytes])
             for tensor in file.tensors}
    theirs = {key: (view["dtype"], view["shape"], bytes(view["data"]))
              for key, view in safetensors.deserialize(content)}
    assert found == theirs


LEVELS = [re.compile(rb".", re.S), re.compile(rb'"[^"]*"|[0-9]+|[A-Za-z]+|\s+|.', re.S),
          re.compile(rb'"[^"]*": ?\{[^{}]*\}|.', re.S)]
TOKENS = [b"0", b"1", b"-", b"9", b"1e9", b"NaN", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b" ",
          b"\n", b"{}", b"\\u0000", b"\\ud800", b"\xff", b"\0", b'"a"', b'"F32"', b'"BF16"', b'"F8_E4M3"', b'"F4"',
          b'"dtype"', b'"x"', b"-0", b'"__metadata__"', b'"__metadata__":{"k":"v"},', b'"__metadata__":null,', b"4.0",
          b"00", b"%d" % 2**48, b"%d" % 2**64]
SPELLINGS = [(b"BF16", b"I16"), (b"F32", b"U32"), (b"a", b"\\u0061"), (b"[", b"[ "), (b":", b" :\n"), (b"1]", b"1,1]"),
             (b"4]", b"%d]" % 2**48)]


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
