"""Blocks are shared with the source where the file system can; elsewhere the same bytes are copied.

XFS and btrfs on loop devices. Free space before and after shows what was shared, not the tool's word alone.
"""
import json
import os
import shutil
import subprocess

import pytest
import xxhash
from faults import manifest_of, tree_of

from stream_reshard.cli import main
from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.convert import conversion as convert
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import Interrupted, SourceError
from stream_reshard.storage.cloning import can_clone, inner_blocks

MAKE = {"xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 4000}
"""Rows of two KiB: half a block, as an odd number of them in a rank shows."""

OWN = {"config.yaml", "stream_reshard.json"}
"""What differs between two runs of a conversion: paths and digests."""


def run(*command):
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """copied(tp, pp): the tree of a conversion where nothing can be shared, and its source."""
    root = tmp_path_factory.mktemp("copied")
    write_random_source(root / "hf", CONFIG | SIZES)

    def convert(tp, pp):
        destination = root / f"nt{tp}{pp}"
        if not destination.exists():
            run_conversion(plan_conversion(Options(root / "hf", destination, tp=tp, pp=pp)))
        return tree(destination)

    return root / "hf", convert


def tree(root):
    return {path: digest for path, digest in tree_of(root).items() if path not in OWN}


@pytest.fixture(params=sorted(MAKE))
def disk(request, tmp_path, copied):
    """A file system that can share blocks, with the source on it."""
    if os.geteuid() or not shutil.which(MAKE[request.param][0]):
        pytest.skip(f"needs root and {MAKE[request.param][0]}")
    image, mounted = tmp_path / "image", tmp_path / "mnt"
    mounted.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(400 * 2**20)
    run(*MAKE[request.param], image)
    run("mount", "-o", "loop", image, mounted)
    try:
        shutil.copytree(copied[0], mounted / "hf")
        os.sync()
        yield mounted
    finally:
        run("umount", mounted)


def used(mounted):
    """Bytes in use, everything written."""
    run("sync", "-f", mounted)
    status = os.statvfs(mounted)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def converted(disk, capsys, *flags, name="nt"):
    """What the command says of a conversion, as JSON."""
    assert main([str(disk / "hf"), str(disk / name), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("tp, pp, least", [(1, 2, 0.99), (4, 2, 0.65)])
def test_stretches_are_cloned_to_the_same_result(disk, capsys, copied, tp, pp, least):
    before = used(disk)
    facts = converted(disk, capsys, "--tp", str(tp), "--pp", str(pp))
    after, weights = used(disk), facts["nbytes_cloned"] + facts["nbytes_copied"] + facts["nbytes_strided"]
    assert weights == 2 * facts["num_parameters"] and facts["nbytes_cloned"] >= least * weights
    assert facts["io"]["rchar"] < facts["source"]["nbytes"], "what is cloned is not read"
    assert after - before < weights - facts["nbytes_cloned"] + 8 * 2**20, "the free space shows the sharing"
    assert tree(disk / "nt") == copied[1](tp, pp)
    assert main(["verify", str(disk / "hf"), str(disk / "nt"), "--quiet"]) == 0
    shutil.rmtree(disk / "hf")
    run("sync", "-f", disk)
    assert tree(disk / "nt") == copied[1](tp, pp), "it survives the source"


def test_what_is_cloned_has_no_digest_unless_asked_for(disk, capsys):
    counts = {}
    for how in ("auto", "all", "none"):
        counts[how] = converted(disk, capsys, "--tp", "4", "--digests", how, name=how)["num_digests"]
        for file in manifest_of(disk / how)["files"]:
            content = (disk / how / file["path"]).read_bytes()
            assert file["nbytes"] == len(content)
            assert file["xxh3_128"] in (None, xxhash.xxh3_128(content).hexdigest())
        assert main(["verify", str(disk / "hf"), str(disk / how), "--quiet"]) == 0
    assert counts["none"] == 0 < counts["auto"] < counts["all"]


def test_a_flipped_bit_without_a_digest_is_found_by_its_weight(disk, capsys):
    converted(disk, capsys)
    path = next(path for path in (disk / "nt").rglob("*.safetensors") if "gate_up" in str(path))
    with open(path, "r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))
    assert main(["verify", str(disk / "hf"), str(disk / "nt")]) == 5
    assert "gate_up_proj" in capsys.readouterr().err


def test_what_is_cloned_needs_no_room(disk, capsys):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    weights = converted(disk, capsys, "--pp", "2")["num_parameters"] * 2
    shutil.rmtree(disk / "nt")
    with open(disk / "ballast", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free - weights // 2)
    run("sync", "-f", disk)
    assert main([str(disk / "hf"), str(disk / "nt"), "--tp", "4", "--quiet", "--dtype", "float32"]) == 6
    assert "its disk has" in capsys.readouterr().err
    converted(disk, capsys, "--pp", "2")
    assert main(["verify", str(disk / "hf"), str(disk / "nt"), "--quiet"]) == 0


def test_a_stopped_run_goes_on(disk, copied):
    options, seen = Options(disk / "hf", disk / "nt", tp=4, pp=2), []

    def stop(job):
        seen.append(job)
        if len(seen) == 5:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run_conversion(plan_conversion(options), stop)
    assert staging_of(disk / "nt").exists()
    run_conversion(plan_conversion(options))
    assert tree(disk / "nt") == copied[1](4, 2)


def test_between_two_file_systems_everything_is_copied(disk, tmp_path, copied, capsys):
    assert not can_clone(disk / "hf" / "model.safetensors", tmp_path)
    assert main([str(disk / "hf"), str(tmp_path / "nt"), "--tp", "4", "--pp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nbytes_cloned"] == 0
    assert tree(tmp_path / "nt") == copied[1](4, 2)


@pytest.mark.parametrize("source_offset, offset, nbytes, wanted", [
    (8192, 4096, 16384, (4096, 20480)),    # Whole blocks.
    (8200, 4104, 16384, (8192, 20480)),    # Congruent, with ragged edges.
    (8200, 4096, 16384, (20480, 20480)),   # Not congruent: nothing.
    (8200, 4104, 4096, (8200, 8200)),      # No whole block inside.
    (0, 0, 4096, (4096, 4096)),            # One block is not worth a call.
])
def test_inner_blocks(source_offset, offset, nbytes, wanted):
    assert inner_blocks(source_offset, offset, nbytes) == wanted


def test_on_a_network_the_server_copies(tmp_path, copied, monkeypatch):
    """copy_file_range works everywhere; only on networks it is the faster way."""
    monkeypatch.setattr(convert, "file_system_of", lambda path: "nfs4")
    real, moved = os.copy_file_range, []
    monkeypatch.setattr(os, "copy_file_range", lambda *args: moved.append(real(*args)) or moved[-1])
    done = run_conversion(plan_conversion(Options(copied[0], tmp_path / "nt", tp=4, pp=2)))
    assert sum(moved) == done.moved.copied and done.num_digests < len(copied[1](4, 2)) - 5
    assert tree(tmp_path / "nt") == copied[1](4, 2)


@pytest.mark.parametrize("reads, how", [(0, "mmap"), (1, "pread")])
def test_a_mapping_gives_the_same_result(tmp_path, copied, monkeypatch, reads, how):
    """Stretches are written straight from it: only what is strided is read."""
    real, read = os.preadv, []

    def preadv(descriptor, views, offset, *flags):
        if not flags and os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.safetensors"):
            read.append(sum(map(len, views)))
        return real(descriptor, views, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    done = run_conversion(plan_conversion(Options(copied[0], tmp_path / "nt", tp=4, pp=2, io=how)))
    assert sum(read) == done.moved.strided + reads * done.moved.copied
    assert tree(tmp_path / "nt") == copied[1](4, 2)
    assert all(file["xxh3_128"] for file in manifest_of(tmp_path / "nt")["files"])


@pytest.mark.parametrize("how", ["mmap", "pread"])
def test_a_source_that_shrinks_is_a_clear_error(tmp_path, copied, how):
    shutil.copytree(copied[0], tmp_path / "hf")
    planned = plan_conversion(Options(tmp_path / "hf", tmp_path / "nt", tp=4, pp=2, io=how))

    def shrink(job):
        os.truncate(tmp_path / "hf" / "model.safetensors", 2**20)

    with pytest.raises(SourceError, match="shrank during the run: it ends before byte|changed during the run"):
        run_conversion(planned, shrink)
    assert not (tmp_path / "nt").exists()
