"""A folder in the hub's cache is known by repository and commit: the plan, its JSON and the manifest name both."""
import pytest
from sources import make_source

from stream_reshard import api
from stream_reshard.destination.manifest import read_manifest
from stream_reshard.formats.hugging_face.hub import origin_of
from stream_reshard.formats.nanotron.source import origin_in

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(tmp_path):
    """A snapshot as huggingface_hub keeps it: links to blobs."""
    plain = make_source(tmp_path / "plain", num_shards=2)
    cache = tmp_path / "hub" / "models--org--a-model"
    snapshot, blobs = cache / "snapshots" / COMMIT, cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_is_recorded_as_repository_and_commit(tmp_path):
    conversion = api.plan(cached(tmp_path), tmp_path / "nt", tp=2)
    assert {"repo": "org/a-model", "commit": COMMIT}.items() <= conversion.facts["source"].items()
    assert f"org/a-model on the hub, commit {COMMIT}" in str(conversion)
    api.run(conversion)
    assert read_manifest(tmp_path / "nt").facts["origin"] == {"repo": "org/a-model", "commit": COMMIT}
    back = api.plan(tmp_path / "nt", tmp_path / "back", to="hf")
    assert f"org/a-model on the hub, commit {COMMIT}" in str(back)
    card = back.output.documents["README.md"].decode()
    assert "base_model: org/a-model" in card and COMMIT in card


@pytest.mark.parametrize("origin", [None, "x", {}, {"repo": "a/b"}, {"repo": "a/b\n", "commit": COMMIT},
                                    {"repo": "a/b/c", "commit": COMMIT}, {"repo": "a/b", "commit": "main"}])
def test_an_origin_in_a_manifest_that_is_none_is_left_out(origin):
    assert origin_in({"origin": origin}) is None


@pytest.mark.parametrize("path", ["models--org--a/snapshots/main", f"models--org--a/{COMMIT}", f"org/snapshots/{COMMIT}",
                                  f"datasets--org--a/snapshots/{COMMIT}", f"snapshots/{COMMIT}"])
def test_other_folders_have_no_origin(tmp_path, path):
    assert origin_of(tmp_path / path) is None


def test_a_repository_without_an_organisation(tmp_path):
    assert origin_of(tmp_path / "models--gpt2" / "snapshots" / COMMIT) == {"repo": "gpt2", "commit": COMMIT}
