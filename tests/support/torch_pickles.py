"""Pickles of torch in pieces, to be put together wrongly."""
import pickletools

from torch_files import members_of, pieces


def pickle_of(content):
    name = next(name for name in members_of(content) if name.endswith("/data.pkl"))
    return b"".join(pieces(content, members_of(content)[name]))


class Call:
    """What runs code where it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def opcodes(text):
    """The opcodes of a pickle, each with its argument."""
    at = [position for _, _, position in pickletools.genops(text)] + [len(text)]
    return [text[a:b] for a, b in zip(at, at[1:])]


P, TENSOR = b"\x80\x02", b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%sX\3\0\0\0cpu%stQ"
ORDERED = b"ccollections\nOrderedDict\n)R"


def tensor(offset=b"K\0", shape=b"K\3\x85", strides=b"K\1\x85", grad=b"\x89", hooks=ORDERED, key=b"0", numel=b"K\3"):
    return TENSOR + b"(" + STORAGE % (key, numel) + offset + shape + strides + grad + hooks + b"tR"
