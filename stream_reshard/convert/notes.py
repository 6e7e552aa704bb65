"""Notes: facts about a conversion that a user may not expect, reported before anything is written."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stream_reshard.destination.companions import CONFIG_NAME, Companion
from stream_reshard.errors import quoted
from stream_reshard.formats.base import Source, Target
from stream_reshard.formats.nanotron.training.files import has_state
from stream_reshard.options import Options
from stream_reshard.plan.plan import Plan
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.small_files import open_regular

_ADAPTER = "adapter_config.json"

_TABLES = ("tokenizer.json", "added_tokens.json", "vocab.json")
"""Files with a table of tokens, each followed by its id."""

_NOT_IDS = rb'(?<!max_length":)(?<!per_word":)(?<!stride":)(?<!multiple_of":)'
"""Keys of a tokenizer.json whose numbers are no ids (Truncation, Padding, WordPiece of the tokenizers library)."""

_PIECE = re.compile(rb'\[\s{0,64}"(?:[^"\\]|\\.)*"\s{0,64},\s{0,64}-?[\d.]')
"""An entry of a Unigram vocabulary; its id is its index in the list."""

_CHUNK_NBYTES = 2**18
_TAIL_NBYTES = 2**12
"""Limit on an entry of a table; so many bytes of a chunk are searched again with the next chunk."""

_MAX_READ_NBYTES = 2**26
"""Bytes of a tokenizer file that are searched."""


def notes_of(options: Options, source: Source, target: Target[Any], plan: Plan,
             companions: Mapping[str, Companion]) -> Iterator[str]:
    """Remarks on a conversion for the user."""
    if options.destination is not None and options.destination.is_symlink():
        yield f"{quoted(options.destination)} is a link; {quoted(os.path.realpath(options.destination))} is written"
    yield from (f"accepted: {setting.text}" for setting in target.unsupported(source))
    yield from source.notes
    if (source.root / _ADAPTER).is_file():
        yield f"{_ADAPTER}: the adapter beside the weights is not merged into them; they are converted without it"
    if has_state(source.root) and target.state(plan.target) is None:
        yield (f"the state of the training is left behind: {'masters' if options.from_masters else 'weights'} alone "
               f"are written")
    yield from too_many_ids(companions, source.config.vocab_size)
    if plan.target.format == "Nanotron":
        yield from rounded(plan)
        yield from bare_tokenizer(companions)
    yield from target.notes(source, plan.target)


def main_dtype(plan: Plan) -> str:
    """The dtype that most bytes of the target's weights have, under torch's name."""
    return TORCH_DTYPES[max(plan.dtypes.items(), key=lambda item: item[1])[0]]


def rounded(plan: Plan) -> Iterator[str]:
    """Notes on weights that Nanotron will load in another dtype: that of its config, or for routers float32
    (nanotron/nn/moe.py)."""
    if len(plan.dtypes) < 2:
        return
    layout, model, dtype = plan.target, plan.target.model, main_dtype(plan)
    found: dict[str, list[int]] = {}
    for row in model.stored_rows:
        if not model.rows[row].is_float32:
            for number in model.numbers_of(row):
                if TORCH_DTYPES[layout.dtype_at(number)] != dtype:
                    found.setdefault(layout.dtype_at(number), []).append(number)
    for other, numbers in found.items():
        verb = "loads them as that" if dtype == "float32" else "rounds them when it loads"
        yield (f"{len(numbers)} tensors such as {model.parameter(numbers[0]).hugging_face} are {other}, config.yaml "
               f"says {dtype}: Nanotron {verb}")


def bare_tokenizer(companions: Mapping[str, Companion]) -> Iterator[str]:
    """A note on a tokenizer of Meta's, which does not tell its class and its special tokens."""
    if "tokenizer.model" in companions and not {"tokenizer.json", CONFIG_NAME} & companions.keys():
        yield (f"tokenizer.model alone, without tokenizer.json and {CONFIG_NAME}: transformers, with which Nanotron "
               f"reads a tokenizer, may refuse it or not know its special tokens; --tokenizer takes that of another "
               f"folder")


def too_many_ids(companions: Mapping[str, Companion], num_rows: int) -> Iterator[str]:
    """Notes on a tokenizer with ids for which the embedding has no row."""
    found = {}
    for name in (*_TABLES, CONFIG_NAME):
        if name in companions:
            try:
                found[name] = _num_ids(companions[name].path, name, num_rows)
            except OSError as error:
                yield f"{quoted(name)} cannot be read: {error.strerror}; its ids are not compared with the embedding"
    if found and (num_ids := max(found.values())) > num_rows:
        name = max(found, key=found.__getitem__)
        yield (f"the tokenizer has ids up to {num_ids - 1} ({quoted(name)}), but the embedding has {num_rows} rows: a "
               f"text with one of the last {num_ids - num_rows} ids cannot be embedded; resize_token_embeddings in "
               f"transformers adds rows, --tokenizer takes another tokenizer")


def _num_ids(path: Path, name: str, num_rows: int) -> int:
    """1 + the highest id in a file of a tokenizer; ids below `num_rows` may be missed. The text is searched, not
    parsed: it may be large, or invalid."""
    fewest = len(str(num_rows))
    digits = rb"(\d{%d,18})" % fewest
    if name == CONFIG_NAME:  # added_tokens_decoder
        pattern = re.compile(rb'"' + digits + rb'"\s{0,64}:\s{0,64}\{')
    else:
        # For speed in a text of some MB, the pattern begins with a rare character, and then tests a rare successor.
        begin = rb':(?=\s{0,64}\d{%d})(?<=":)' % fewest
        pattern = re.compile(begin + _NOT_IDS + rb"\s{0,64}" + digits + rb"\s{0,64}[,}]")
    highest, num_pieces, is_unigram, tail = -1, 0, False, b""
    with open_regular(path) as stream:
        for _ in range(_MAX_READ_NBYTES // _CHUNK_NBYTES):
            chunk = stream.read(_CHUNK_NBYTES)
            if not chunk:
                break
            text = tail + chunk
            highest = max([highest, *map(int, pattern.findall(text))])
            end, is_unigram = 0, is_unigram or (name == "tokenizer.json" and b'"Unigram"' in text)
            for match in _PIECE.finditer(text) if is_unigram else ():
                num_pieces, end = num_pieces + 1, match.end()
            tail = text[max(end, len(text) - _TAIL_NBYTES):]
    return max(highest + 1, num_pieces)
