"""A JSON object too large to be parsed at once: read piece by piece, in bounded memory, with the values of `json`.

ijson takes memory in the square of the nesting depth (20,000 bytes of `[`: 955 MiB), and msgspec accepts a key that
occurs twice; so neither is used.
"""
from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from stream_reshard.storage.json_text import position_in, syntax_fault

_CHUNK_NBYTES = 2**16
_SPACE = re.compile(r"[ \t\n\r]*")
_ENTRY = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*([,}])')
"""A key and its value, both strings without escapes, and the comma or bracket after them."""

_DECODER = json.JSONDecoder()


class TooLong(Exception):
    """A single value, or the whole text, has more than `limit` bytes."""

    def __init__(self, limit: int):
        super().__init__(limit)
        self.limit = limit


class JsonReader:
    """A cursor in a JSON text. Every method raises ValueError if the text is not JSON, TooLong if it passes a limit."""

    def __init__(self, stream: BinaryIO, max_nbytes: int, max_value_nbytes: int):
        """`max_nbytes`: limit of the text. `max_value_nbytes`: limit of a value that is parsed at once."""
        self._stream, self._left, self._limits = stream, max_nbytes, (max_nbytes, max_value_nbytes)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0
        self._line, self._column = 1, 1
        """Line and column at which the text in memory begins."""

    def next(self) -> str:
        """The character at the cursor, after spaces are skipped; "" at the end of the text."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # Matches everywhere.
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at:self._at + 1]

    def value(self) -> Any:
        """The value at the cursor, parsed at once; the cursor moves past it."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise ValueError(str(error)) from error
            except json.JSONDecodeError as error:
                if not self._read_on():
                    raise ValueError(syntax_fault(error, self._position(error.pos))) from error
                continue
            except ValueError as error:
                raise ValueError(f"{error} in {self._position(self._at)}") from error
            # A number at the end of the buffer may continue in the bytes that follow.
            if self._text[end:end + 1] in (*"]},: \t\n\r",) or not self._read_on():
                self._at = end
                return value

    def keys(self) -> Iterator[str]:
        """The keys of the object at the cursor. The cursor is then at the value, and the caller must read it."""
        self._pass("{")
        if self.next() == "}":
            self._pass("}")
            return
        while True:
            yield self._key()
            if self._pass(",}") == "}":
                return

    def entries(self) -> Iterator[tuple[str, Any]]:
        """The keys and values of the object at the cursor."""
        for key in self.keys():
            yield key, self.value()
            while self.next() == "," and (entry := _ENTRY.match(self._text, self._at + 1)):
                self._at = entry.end() - 1
                yield entry[1], entry[2]

    def items(self) -> Iterator[Any]:
        """The values of the array at the cursor, each parsed at once."""
        self._pass("[")
        if self.next() == "]":
            self._pass("]")
            return
        while True:
            yield self.value()
            if self._pass(",]") == "]":
                return

    def _key(self) -> str:
        if self.next() != '"':
            raise ValueError(f"a name in quotes is expected in {self._position(self._at)}")
        key: str = self.value()
        self._pass(":")
        return key

    def _pass(self, characters: str) -> str:
        """Move past the next character, which must be one of `characters`, and return it."""
        found = self.next()
        if not found or found not in characters:
            cure = "" if found else "; it is cut off, download it again"
            raise ValueError(f"{' or '.join(characters)} is expected in {self._position(self._at)}{cure}")
        self._at += 1
        return found

    def _read_on(self) -> bool:
        """Drop the text before the cursor and read more; False at the end of the text."""
        num_kept = len(self._text) - self._at
        if num_kept > self._limits[1]:
            raise TooLong(self._limits[1])
        # The read doubles the text, because a long value is parsed anew after each read.
        content = self._stream.read(min(self._left + 1, max(_CHUNK_NBYTES, num_kept)))
        self._left -= len(content)
        if self._left < 0:
            raise TooLong(self._limits[0])
        more = self._decode(content, final=not content)
        if content:
            newline = self._text.rfind("\n", 0, self._at)
            self._line += self._text.count("\n", 0, self._at)
            self._column = self._at - newline if newline >= 0 else self._column + self._at
            self._text, self._at = self._text[self._at:] + more, 0
        return bool(content)

    def _position(self, at: int) -> str:
        return position_in(self._text, at, self._line, self._column)
