"""Ways to break the folder of a checkpoint, or a file in it."""
import json
import re
import shutil
from pathlib import Path

import xxhash
from sources import raw_file
from trees import raw_of


def every(root, *words):
    """The files below a folder whose paths hold all words, sorted."""
    found = sorted(path for path in root.rglob("*") if not path.is_dir() and all(word in str(path) for word in words))
    assert found, f"no file of {words}"
    return found


def poke(path, offset, bit=0):
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def swap(root, word, data_only=False):
    """Exchange the files of tensor-parallel ranks 0 and 1, or only what follows their headers."""
    one, other = every(root, word, "tp-rank-0")[0], every(root, word, "tp-rank-1")[0]
    (_, a, first), (_, b, second) = raw_of(one), raw_of(other)
    one.write_bytes(first[:a] + second[b:] if data_only else second)
    other.write_bytes(second[:b] + first[a:] if data_only else first)


def unshard(root, word):
    """One file, as of a parameter that is not sharded, in place of the rank files of one that is split by rows."""
    paths = every(root, word, "-rank-")
    data = b"".join(raw[begin:] for _, begin, raw in map(raw_of, paths))
    entry = raw_of(paths[0])[0]["data"] | {"data_offsets": [0, len(data)]}
    entry["shape"][0] *= len(paths)
    paths[0].with_name("model_weight.safetensors").write_bytes(raw_file(json.dumps({"data": entry}), data))
    for path in paths:
        path.unlink()


def rename(root, word, old, new):
    """Another name for the files whose path holds `word`."""
    for path in every(root, word, old):
        (target := Path(str(path).replace(old, new))).parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def edit_header(root, old, new, *words, count=None):
    """Change the header text of `count` files, or all; its length may change."""
    for path in every(root, *words, ".safetensors")[:count]:
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        assert old.encode() in raw[:begin], (old, raw[:begin])
        text = raw[8:begin].replace(old.encode(), new.encode()).rstrip()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[begin:])


def edit_json(root, name, **changes):
    """Change keys of a JSON file; the value `...` takes a key out."""
    changed = json.loads((root / name).read_text()) | changes
    (root / name).write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def edit_yaml(root, old, new):
    """Change the text of config.yaml."""
    text = (root / "config.yaml").read_text()
    assert old in text, old
    (root / "config.yaml").write_text(text.replace(old, new, 1))


def bare(root):
    """Without its manifest, a folder must start its own training: nothing tells that the one it was copied from holds
    the same."""
    (root / "stream_reshard.json").unlink(missing_ok=True)
    start_here(root)


def start_here(root):
    """Have the config.yaml in a folder, if there is one, start from that folder."""
    if (path := root / "config.yaml").exists():
        start = f"path: {json.dumps(str(root))}"
        path.write_text(re.sub(r"(?<=init_method:\n    )path: .*?(?=   #|\n)", lambda match: start, path.read_text()))


def replace(path, make, *arguments):
    """Something else under the name of a file: a link, a pipe, a folder."""
    path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
    make(*arguments, path)


def forge(root, change):
    """Change the manifest and give it the digest that it then must have."""
    path = root / "stream_reshard.json"
    value = json.loads(path.read_text())
    del value["xxh3_128"]
    change(value)
    rest = json.dumps(value, indent=1)[2:].encode()
    path.write_bytes(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128(rest).hexdigest().encode() + rest)
