"""Rows of padding are trained, and are state: they move, and new ones repeat a trained one where one is known."""
import pytest
from running import call
from torch_files import read
from training import load, make_training

VOCAB, TIED = 13, [False, True]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB}


def rows_of(root, kind):
    """The states of the embedding, row by row, of a checkpoint at any TP without ZeRO."""
    found = []
    for path in sorted((root / "optimizer").glob("optimizer_pp-0-*.pt")):
        contents = load(path)
        number = next(n for n, name in contents["names"].items() if "token_embedding" in name)
        found += [row.tobytes() for row in (contents["gradient_accumulator"][contents["names"][number]]
                                            if kind == "master" else contents["state"][number][kind])]
    return found


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize("zero", [(), ("--dp", 2, "--zero", 1)], ids=["whole", "zero"])
def test_new_rows_repeat_a_trained_one(tmp_path, capsys, tied, zero):
    source = make_training(tmp_path / "a", tied=tied, config=HEADS, tp=2)
    assert call(source, tmp_path / "b", "--to", "nanotron", "--tp", 4, "--vocab-size", VOCAB, *zero) == 0
    assert "2 rows after 14, copies of the trained row of padding 13" in " ".join(capsys.readouterr().out.split())
    assert call("verify", source, tmp_path / "b", "--vocab-size", VOCAB) == 0
    assert call(tmp_path / "b", tmp_path / "c", "--quiet", "--to", "nanotron", "--tp", 4, "--zero", 0) == 0
    for kind in ("exp_avg", "exp_avg_sq", "master"):
        before, after = rows_of(source, kind), rows_of(tmp_path / "c", kind)
        assert (len(before), len(after)) == (14, 16)
        assert after[:14] == before and after[14] == after[15] == before[13] and any(before[13])


def test_rows_that_are_not_needed_are_dropped(tmp_path, capsys):
    source = make_training(tmp_path / "a", config=HEADS, tp=2)
    assert call(source, tmp_path / "b", "--to", "nanotron", "--vocab-size", VOCAB) == 0
    assert "loses its last 1 rows of padding" in " ".join(capsys.readouterr().out.split())
    assert rows_of(tmp_path / "b", "exp_avg") == rows_of(source, "exp_avg")[:VOCAB]
    assert read(next((tmp_path / "b" / "optimizer").glob("*.pt"))).contents["names"]


def test_zeros_where_no_row_of_padding_is_known(tmp_path, capsys):
    source = make_training(tmp_path / "a", config=HEADS, tp=2)
    assert call(source, tmp_path / "b", "--to", "nanotron", "--tp", 4) == 0
    assert "gets 2 rows of zeros after 14" in " ".join(capsys.readouterr().out.split())
    assert [any(row) for row in rows_of(tmp_path / "b", "exp_avg")[14:]] == [False, False]


@pytest.mark.parametrize("size, words", [(15, "the embedding has 14 rows"), (0, "at least 1")])
def test_sizes_that_cannot_be(tmp_path, capsys, size, words):
    source = make_training(tmp_path / "a", config=HEADS, tp=2)
    assert call(source, tmp_path / "b", "--quiet", "--to", "nanotron", "--vocab-size", size) == 2
    assert words in capsys.readouterr().err
