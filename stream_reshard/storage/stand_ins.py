"""Stand-ins: other contents in place of a file, such as a Git LFS pointer, a server's error page, an archive."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stream_reshard.errors import quoted

HEAD_NBYTES = 1024
"""Number of first bytes by which a stand-in is recognized."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)

_ARCHIVES = {
    b"PK\x03\x04": "a zip file, as torch.save writes pickled weights", b"PK\x05\x06": "an empty zip file",
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file, as TensorFlow writes weights", b"\x93NUMPY": "a NumPy file",
    b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file", b"(\xb5/\xfd": "a Zstandard file",
    b"7z\xbc\xaf": "a 7-Zip file", b"Rar!": "a RAR file", b"%PDF": "a PDF file", b"\x7fELF": "a program"}
"""Kind of a file, by its first bytes."""

_ANSWERS = {"error", "errors", "message", "detail", "error_description"}
"""Keys of the JSON that a server answers instead of a file."""

_AGAIN = "the download failed, perhaps without a log-in; download it again"


def stand_in(head: bytes, wanted: str | None) -> tuple[str, str] | None:
    """(phrase for several such files, fault and cure of this one) of a stand-in, by the first bytes of a file; None for
    bytes that are not recognized. `wanted`: "weights" (safetensors), "JSON", or None for a file of any kind."""
    if head.startswith(_POINTER):
        size = _POINTER_SIZE.search(head)
        nbytes = f" of {int(size[1])} bytes" if size else ""
        return ("files are Git LFS pointers",
                f"is a Git LFS pointer, not the file{nbytes} that it stands for; run: git lfs pull")
    if wanted is None:
        return None
    if not head:
        return "files are empty", "is empty (0 bytes); download it again"
    if (wanted == "weights" and head[8:9] == b"{") or (wanted == "JSON" and head.lstrip()[:1] in (b"{", b"[")):
        return None  # The file begins as wanted.
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            cure = _cure(kind, wanted)
            return f"files are {wanted} in name only", f"is {kind}, not {wanted} as its name claims{cure}"
    return _text(head, wanted)


def _cure(kind: str, wanted: str) -> str:
    if "zip file, as" in kind and wanted == "weights":
        return ("; where torch.save wrote it, under the name pytorch_model.bin it is read without unpickling it; or "
                "download the safetensors")
    if "pickle" in kind:
        return ("; a bare pickle can run code and is never opened: load it where you trust it and save the model with "
                "save_pretrained, or download the safetensors")
    return "; download the file itself"


def _text(head: bytes, wanted: str) -> tuple[str, str] | None:
    """The result of `stand_in` for a file that begins with printable text; None for other bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        begin = text.decode()[:60]
    except UnicodeDecodeError:
        begin = text[:60].decode("latin-1")
    if not begin.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    if text[:1] == b"<":
        markup = "XML" if text[:5] == b"<?xml" or b"<Error>" in text else "HTML"
        return f"files are pages of {markup}", f"is a page of {markup}, not {wanted} ({quoted(begin)}); {_AGAIN}"
    kind = "JSON" if text[:1] in (b"{", b"[") else "text"
    return f"files are {kind}", f"is {kind}, not {wanted} ({quoted(begin)}); {_AGAIN}"


def answer(value: Mapping[str, Any], needed: str) -> str | None:
    """The fault and cure if a JSON object is a server's answer instead of a file, which would have the key `needed`."""
    if needed in value or len(value) > 8 or not (found := _ANSWERS & value.keys()):
        return None
    return f"is the answer of a server, not the file ({quoted(value[min(found)])}); {_AGAIN}"
