"""A Nanotron checkpoint as a source: what must be said of it, and what is refused."""
import json
import shutil
from pathlib import Path

import pytest
from conversions import (
    assert_same, convert, damage_config, damage_exchanged, damage_extra,
    damage_limit, damage_missing, damage_shape, damage_stale, damage_version, tensors)
from sources import make_source

from stream_reshard.cli import main


def test_a_vocabulary_that_is_not_known_is_asked_for(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2)
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf"]) == 2
    assert "--vocab-size is needed: the embedding has 12 rows" in capsys.readouterr().err
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--vocab-size", "13"]) == 2
    assert "--vocab-size 13: the embedding has 12 rows" in capsys.readouterr().err
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--vocab-size", 11)
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_what_the_manifest_says_of_the_vocabulary_stands(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--vocab-size", "10"]) == 2
    assert "--vocab-size 10: the manifest of" in capsys.readouterr().err


def test_format_1_3_is_read(tmp_path):
    """It says nothing of RoPE and interleaves, as all did before September 2024."""
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2, "--checkpoint-version", "1.4", "--rope", "interleaved")
    for path in (tmp_path / "nt" / "model").rglob("*rank*"):
        path.write_bytes(path.read_bytes().replace(b'"version":"1.4"', b'"version":"1.3"'))
    config = json.loads((tmp_path / "nt" / "model_config.json").read_text())
    config.pop("rope_interleaved")
    (tmp_path / "nt" / "model_config.json").write_text(json.dumps(config))
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--vocab-size", 11)
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_the_target_must_be_said(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    assert main([str(tmp_path / "nt"), str(tmp_path / "other"), "--tp", "2"]) == 2
    assert "--to hf" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "other"), "--vocab-size", "11"]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags, message", [
    (["--to", "hf", "--tp", "2"], "error: --tp with --to hf"), (["--to", "hf", "--rope", "neox"], "--rope with --to hf"),
    (["--to", "hf", "--vocab-size", "0"], "--vocab-size 0: it is at least 1"),
    (["--to", "hf", "--vocab-size", "13"], "--vocab-size 13: the embedding has 12 rows"),
    (["--to", "hf", "--max-shard-size", "0"], "is not a size"),
    (["--to", "hf", "--tokenizer", "/nowhere"], "holds none of")])
def test_flags_that_mean_nothing_are_refused(tmp_path, capsys, flags, message):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", [damage_stale, damage_missing, damage_extra, damage_exchanged, damage_shape,
                                    damage_version, damage_limit, damage_config])
@pytest.mark.parametrize("to", ["hf", "nanotron"])
def test_a_source_that_is_not_whole_is_refused(tmp_path, capsys, damage, to):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    message = damage(tmp_path / "nt")
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", to]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_block_on_another_stage_is_found_where_it_stands(tmp_path, capsys):
    """Nanotron's loader looks for it everywhere; so do we, and say it."""
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--pp", 2)
    for path in sorted((tmp_path / "nt" / "model").rglob("*decoder/0/**/*pp-rank-0-of-2*")):
        path.rename(path.with_name(path.name.replace("pp-rank-0", "pp-rank-1")))
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert "decoder.0 are on other stages" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "back"), tensors(source))


def damage_sizes(root, **sizes):
    path = root / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))


@pytest.mark.parametrize("family, sizes, message", [
    ("llama", {"vocab_size": 11}, "11 vocab cannot be split by the 2 tensor-parallel ranks"),
    ("llama", {"intermediate_size": 21}, "21 ffn cannot be split"),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "1 heads cannot be split"),
    ("qwen2_moe", {"moe_config": {"num_experts": 4000, "top_k": 2, "moe_intermediate_size": 6, "layers": [-1],
                                  "shared_expert_intermediate_size": 10, "enable_shared_expert": True}},
     "holds 3 experts, but num_experts in model_config.json is 4000"),
    ("qwen2_moe", {"moe_config": {"num_experts": 10**6}}, "num_experts is 1000000, more than 4096")])
def test_sizes_that_are_not_those_of_the_files_are_refused(tmp_path, capsys, family, sizes, message):
    convert(make_source(tmp_path / "hf", family=family), tmp_path / "nt", "--tp", 2)
    damage_sizes(tmp_path / "nt", **sizes)
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", "hf"]) == 3
    assert message in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nt")]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "nt")]) in (3, 5)


def test_a_name_that_speaks_of_a_million_ranks_is_refused(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    for path in (tmp_path / "nt" / "model").rglob("*tp-rank-0-of-1*"):
        path.rename(path.with_name(path.name.replace("tp-rank-0-of-1", "tp-rank-0-of-999999")))
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", "hf"]) == 3
    assert "are for 999999 ranks" in capsys.readouterr().err


def test_an_unknown_block_is_named(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    path = next((tmp_path / "nt" / "model").rglob("*lm_head/pp_block/*"))
    other = Path(str(path).replace("lm_head", "vision_tower"))
    other.parent.mkdir(parents=True)
    shutil.copy(path, other)
    assert main(["inspect", str(tmp_path / "nt")]) == 0
    assert "vision_tower" in capsys.readouterr().out


def test_a_source_of_links_into_the_destination_is_kept(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    shutil.copytree(tmp_path / "nt", tmp_path / "links", copy_function=lambda a, b: Path(b).symlink_to(a))
    for path in (tmp_path / "links").iterdir():
        if path.is_symlink():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    assert main([str(tmp_path / "links"), str(tmp_path / "nt"), "--to", "nanotron", "--overwrite"]) == 4
    assert "links to is in" in capsys.readouterr().err
