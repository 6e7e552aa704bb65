"""The tokens that both models read: from a text, by the model's own tokenizer, or random ones."""
from __future__ import annotations

import codecs
import random
from collections.abc import Sequence
from pathlib import Path

from stream_reshard.errors import SourceError, UsageError, quoted
from stream_reshard.storage.small_files import open_regular

TOKENIZER_NAME = "tokenizer.json"

_TEXT_NBYTES_PER_TOKEN = 64
"""Bytes of a text that are read per token; few tokens are longer."""

_MAX_TOKENIZER_NBYTES = 2**26
"""Limit on tokenizer.json; the largest known ones have some 20 MB."""


def random_tokens(number: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids; equal on all machines for equal seeds."""
    return [random.Random(f"{seed} {index}").randrange(vocab_size) for index in range(number)]


def tokens_of(text: Path, roots: Sequence[Path], number: int, vocab_size: int) -> list[int]:
    """The first tokens of a text file, at most `number`, by the tokenizer.json that one of the folders holds.

    Raises UsageError for a text that cannot be read or has less than two tokens, and for a missing package; SourceError
    for a missing tokenizer, or one of another vocabulary.
    """
    content = _read(text, number * _TEXT_NBYTES_PER_TOKEN)
    root = next((root for root in roots if (root / TOKENIZER_NAME).is_file()), None)
    if root is None:
        raise SourceError(f"--text needs a {TOKENIZER_NAME}, and neither folder holds one; "
                          f"AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC) makes it, or leave --text out")
    if (root / TOKENIZER_NAME).stat().st_size > _MAX_TOKENIZER_NBYTES:
        raise SourceError(f"{TOKENIZER_NAME} in {quoted(root)} has more than {_MAX_TOKENIZER_NBYTES} bytes")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError("--text needs the package tokenizers: pip install 'stream_reshard[torch]'") from error
    try:
        tokens = Tokenizer.from_file(str(root / TOKENIZER_NAME)).encode(content).ids[:number]
    except Exception as error:  # The package raises nothing more precise.
        raise SourceError(f"{TOKENIZER_NAME} in {quoted(root)} cannot be used: {quoted(error)}") from error
    if len(tokens) < 2:
        raise UsageError(f"--text {quoted(text)} gives {len(tokens)} tokens; at least 2 are needed")
    if max(tokens) >= vocab_size:
        raise SourceError(f"{TOKENIZER_NAME} in {quoted(root)} gives the token {max(tokens)}, the vocabulary has "
                          f"{vocab_size} rows")
    return tokens


def _read(path: Path, max_nbytes: int) -> str:
    try:
        with open_regular(path) as stream:
            content = stream.read(max_nbytes + 1)
    except OSError as error:
        raise UsageError(f"--text {quoted(path)}: {error.strerror}") from error
    try:
        # A text that was cut may end within a character.
        return codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) <= max_nbytes)
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {quoted(path)} is not UTF-8: {error.reason} at byte {error.start}") from error
