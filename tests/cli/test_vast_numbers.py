"""Numbers past all bounds are refused at once, in a line that a screen can hold."""
import subprocess

import pytest
from shells import code_of
from sources import make_source

from stream_reshard.cli import main


def test_a_vast_number_of_stages_is_refused_at_once(tmp_path, capsys):
    make_source(tmp_path / "hf")
    assert main(["plan", str(tmp_path / "hf"), "--pp", "2000000000"]) == 2
    assert "--pp can be 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1" + "0" * 30, "9" * 5000, "-" + "9" * 40, "999999999999999"], ids=lambda number: number[:20])
def test_vast_numbers_are_one_line(tmp_path, capsys, number):
    """Also as sizes; those that only set a limit may be as large as they like."""
    source = make_source(tmp_path / "hf")
    flags = ["--tp", "--pp", "--vocab-multiple", "--workers", "--vocab-size", "--max-memory", "--max-shard-size"]
    for words in ([str(source), str(tmp_path / "nt"), flag, number] for flag in flags):
        code = code_of(words)
        err = capsys.readouterr().err.splitlines()
        assert code in (2, 6) or (words[2] in ("--max-memory", "--max-shard-size") and code == 0), (words, code)
        assert all(len(line) < 400 for line in err)
        subprocess.run(["rm", "-rf", tmp_path / "nt"], check=True)
    assert main([str(source), str(tmp_path / "nt"), "--quiet"]) == 0
    for flag in ("--seed", "--workers", "--sample", "--tokens"):
        assert code_of(["verify", str(source), str(tmp_path / "nt"), flag, number]) in (0, 2, 6)
        capsys.readouterr()


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rope_theta", "rms_norm_eps", "max_position_embeddings",
                                 "bos_token_id", "initializer_range", "num_hidden_layers", "head_dim", "sliding_window",
                                 "attention_dropout", "partial_rotary_factor", "rope_scaling"])
def test_vast_numbers_in_a_config_are_no_traceback(tmp_path, capsys, key):
    source = make_source(tmp_path / "hf", config={"rope_scaling": None})
    text = (source / "config.json").read_text().rstrip()[:-1]
    lines = [line for line in text.splitlines() if f'"{key}"' not in line]
    for number in ("1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "1e999", "-1e999"):
        value = f'{{"rope_type": "linear", "factor": {number}}}' if key == "rope_scaling" else number
        (source / "config.json").write_text("\n".join(lines).rstrip().rstrip(",") + f', "{key}": {value}}}')
        assert main(["plan", str(source), "--max-memory", "4GiB"]) in (0, 3)
        assert all(len(line) < 700 for line in capsys.readouterr().err.splitlines())
