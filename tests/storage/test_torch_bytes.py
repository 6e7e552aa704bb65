"""Every byte of a .pt file is checked: the records by their checksums, the rest by what torch writes there."""
import random
import zipfile

import pytest
from torch_files import GOLDEN_TRAINING, saved

from stream_reshard.errors import StreamReshardError
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.torch_bytes import damage_in
from stream_reshard.storage.torch_file import read_torch_file

torch = pytest.importorskip("torch")


def damage(path):
    """What is said of a file, by an error too."""
    try:
        return damage_in(path.parent, path.name, memoryview(bytearray(1000)), Stop())
    except StreamReshardError as error:
        return str(error)


@pytest.fixture
def state(tmp_path):
    return saved({"a": torch.arange(300), "b": [torch.ones(3), torch.zeros(0)], "c": 1}, tmp_path)


def test_what_torch_wrote_is_whole(state):
    assert damage(state) is None


@pytest.mark.skipif(not GOLDEN_TRAINING.is_dir(), reason="the golden checkpoints are not beside this checkout")
def test_what_nanotron_saved_is_whole():
    """Those of the random generators too, whose values are never read."""
    paths = list(GOLDEN_TRAINING.rglob("*.pt"))
    assert len(paths) > 100 and not list(filter(None, map(damage, paths)))


def test_each_byte_matters(state):
    """One bit of every byte; what the values say of the file is not looked at."""
    content, chooser = state.read_bytes(), random.Random(0)
    for at in range(len(content)):
        state.write_bytes(content[:at] + bytes([content[at] ^ 1 << chooser.randrange(8)]) + content[at + 1:])
        assert damage(state), at


def test_the_place_of_a_damage_is_told(state):
    content = state.read_bytes()
    at = content.index(b"Z" * 8)
    state.write_bytes(content[:at] + b"z" + content[at + 1:])
    assert damage(state) == f"'state.pt': between its records, byte {at} is 0x7a, where torch.save writes 0x5a"
    data = read_torch_file(state.parent, state.name)
    member = next(iter(data.records.values()))
    state.write_bytes(content[:member.begin] + b"x" + content[member.begin + 1:])
    assert f"its record 'state/data/0' is damaged: the CRC-32 of 2400 bytes at byte {member.begin} is" in damage(state)


@pytest.mark.parametrize("words", ["nothing", "", "PK\3\4 and no more"])
def test_what_is_no_zip_is_told(tmp_path, words):
    (path := tmp_path / "x.pt").write_text(words)
    assert "'x.pt': " in damage(path)


def test_files_of_other_writers_are_held_to_their_checksums_alone(state):
    """An older torch wrote other records, at other places."""
    with zipfile.ZipFile(state) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist() if "/." not in info.filename}
    with zipfile.ZipFile(state, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    assert damage(state) is None
    content = state.read_bytes()
    at = content.index(records["state/data/0"]) + 5
    state.write_bytes(content[:at] + b"x" + content[at + 1:])
    assert "is damaged" in damage(state)
