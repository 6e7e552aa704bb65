"""Verify keeps the limit on memory, whatever a checkpoint and its documents hold."""
import pytest
from damage import edit_json, forge
from running import call, measured
from trees import write_sparse_source

pytestmark = pytest.mark.usefixtures("held")


def test_a_big_checkpoint_is_verified_in_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    assert call(tmp_path / "hf", tmp_path / "nt", "--quiet", "--tp", "4", "--rope", "interleaved") == 0
    for pair in (("hf", "nt"), ("nt", "hf"), ("nt", "nt")):
        paths = [tmp_path / name for name in pair]
        code, peak, err = measured("verify", *paths, "--max-memory", "64MiB", "--workers", "1")
        assert (code, err) == (0, "") and peak <= 64 * 2**20
    code, _, err = measured("verify", *paths, "--max-memory", "24MiB")
    assert code == 6 and err.count("\n") == 1 and "--max-memory 24.0 MiB cannot be kept" in err


def test_a_cast_that_only_the_manifest_tells_of_counts_in_the_limit(made):
    code, peak, err = measured("verify", made("float_hf"), made("float_cast"), "--max-memory", "128MiB")
    assert (code == 6 and "cannot be kept" in err) or (code == 0 and peak <= 128 * 2**20), f"{peak / 2**20:.0f} MiB"


LONG = [
    ("model_config.json", lambda c: edit_json(c, "model_config.json", **{f"{i}": [] for i in range(200_000)})),
    ("checkpoint_metadata.json", lambda c: edit_json(c, "checkpoint_metadata.json", x=[[]] * 500_000)),
    ("manifest", lambda c: forge(c, lambda m: m.update(x=[[]] * 500_000))),
    ("config.yaml", lambda c: (c / "config.yaml").write_text(f"[{'1,' * 50_000}]")),
    ("config.yaml of references", lambda c: (c / "config.yaml").write_text("".join(
        ["a0: &a0 x\n", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 8)),
         (c / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: *a7")])))]


@pytest.mark.parametrize("change", [pytest.param(change, id=remark) for remark, change in LONG])
def test_no_document_breaks_the_limit(made, copied, change):
    change(root := copied("tp1", is_bare=False))
    code, peak, err = measured("verify", made("hf"), root, "--max-memory", "64MiB", "--workers", "1")
    assert code in (0, 5, 6) and "Traceback" not in err and peak <= 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_a_conversion_with_a_check_keeps_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    code, peak, err = measured(tmp_path / "hf", tmp_path / "nt", "--verify", "--max-memory", "64MiB", "--workers", "1")
    assert (code, err) == (0, "") and peak <= 64 * 2**20
