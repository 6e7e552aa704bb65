"""Manifest and journal state the version of their format: an unknown one is refused with the cure, an older one read."""
import json

import pytest
import xxhash
from running import call
from sources import make_source

from stream_reshard import __version__, api
from stream_reshard.destination.journal import JOURNAL_NAME
from stream_reshard.destination.manifest import FORMAT, MANIFEST_NAME, open_manifest, read_manifest
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import Interrupted, SourceError


def rewritten(root, **changes):
    """The manifest with other keys at its top; None takes one away."""
    path = root / MANIFEST_NAME
    content = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    content.pop("xxh3_128")
    rest = json.dumps(content, indent=1)[2:].encode() + b"\n"
    path.write_bytes(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128(rest).hexdigest().encode() + rest)


@pytest.fixture
def converted(tmp_path):
    """(source, copy)."""
    source = make_source(tmp_path / "hf")
    api.run(api.plan(source, tmp_path / "nt", tp=2, max_memory="8GiB"))
    return source, tmp_path / "nt"


def test_a_manifest_states_format_and_version(converted):
    content = json.loads((converted[1] / MANIFEST_NAME).read_text())
    assert (content["tool"], content["format"], content["version"]) == ("stream_reshard", FORMAT, __version__)


def test_an_older_manifest_is_read(converted):
    rewritten(converted[1], format=None, version=None)
    assert read_manifest(converted[1]).facts == open_manifest(converted[1]).facts
    api.verify(*converted, max_memory="8GiB")


@pytest.mark.parametrize("value", [FORMAT + 1, 0, "1", 1.5, None, [1]])
def test_an_unknown_format_is_refused_with_the_cure(converted, value, capsys):
    if value is None:
        rewritten(converted[1], format={})
    else:
        rewritten(converted[1], format=value)
    for read in (read_manifest, open_manifest):
        with pytest.raises(SourceError, match="update stream_reshard"):
            read(converted[1])
    assert call("verify", *converted) == 5 and "update stream_reshard" in capsys.readouterr().err


def test_a_journal_states_its_format_and_an_unknown_one_is_refused(tmp_path, capsys):
    source, stop = make_source(tmp_path / "hf"), api.Stop()
    conversion = api.plan(source, tmp_path / "nt", tp=2, max_memory="8GiB", workers=1)
    with pytest.raises(Interrupted):
        api.run(conversion, lambda done, total: stop.request(), stop)
    path = staging_of(tmp_path / "nt") / JOURNAL_NAME
    first, second, *rest = path.read_text().splitlines(keepends=True)
    assert json.loads(second)["format"] == FORMAT and json.loads(second)["version"] == __version__
    path.write_text(first + json.dumps(json.loads(second) | {"format": FORMAT + 1}) + "\n" + "".join(rest))
    assert call(source, tmp_path / "nt", "--tp", 2) == 4
    err = capsys.readouterr().err
    assert "update stream_reshard" in err and "--restart" in err
    old = {key: value for key, value in json.loads(second).items() if key not in ("format", "version")}
    path.write_text(first + json.dumps(old) + "\n" + "".join(rest))
    assert call(source, tmp_path / "nt", "--tp", 2) == 0
