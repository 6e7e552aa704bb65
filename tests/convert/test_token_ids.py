"""Token ids: Nanotron gets one of each and none for padding, the way back gives those of the model, verify compares."""
import json

import pytest
import yaml
from conversions import convert
from running import call
from sources import edit_config, make_source
from trees import MANIFEST

from stream_reshard import api

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

SAID = [
    ("plain", "llama", {}, (1, 2), []),
    ("null", "llama", {"bos_token_id": None, "eos_token_id": None}, (1, 2), ["bos_token_id is null", "eos_token_id is null"]),
    ("several", "llama", {"eos_token_id": [2, 3]}, (1, 2), ["eos_token_id is [2, 3]"]),
    ("one in a list", "llama", {"eos_token_id": [5]}, (1, 5), ["eos_token_id is [5]"]),
    ("an empty list", "llama", {"eos_token_id": []}, (1, 2), ["eos_token_id is []"]),
    ("unsaid", "llama", {"bos_token_id": ..., "eos_token_id": ...}, (1, 2), []),
    ("unsaid by Qwen2", "qwen2", {"bos_token_id": ..., "eos_token_id": ...}, (1, 2),
     ["bos_token_id is null", "eos_token_id is null"]),
    ("unsaid by SmolLM3", "smollm3", {"bos_token_id": ..., "eos_token_id": ...}, (128000, 128001),
     ["pad_token_id is 128004"]),
    ("pad below a rank", "llama", {"pad_token_id": 5}, (1, 2), ["pad_token_id is 5"]),
    ("pad past a rank", "llama", {"pad_token_id": 8}, (1, 2), ["pad_token_id is 8"]),
    ("pad past all rows", "llama", {"pad_token_id": 11}, (1, 2), ["pad_token_id is 11"]),
    ("pad of old Llamas", "llama", {"pad_token_id": -1}, (1, 2), ["pad_token_id is -1"]),
    ("pad said to be none", "llama", {"pad_token_id": None}, (1, 2), []),
]


def ids_of(folder, name="config.json"):
    config = json.loads((folder / name).read_text())
    return {key: config[key] for key in IDS if key in config}


@pytest.mark.parametrize("family, config, written, notes", [pytest.param(*row[1:], id=row[0]) for row in SAID])
def test_ids_there_across_and_back(tmp_path, family, config, written, notes):
    source = make_source(tmp_path / "hf", family=family, tied=family == "smollm3", config=config)
    conversion = api.plan(source, tmp_path / "nt", tp=2)
    about_ids = [note for note in conversion.notes if "_token_id" in note]
    assert len(about_ids) == len(notes) and all(map(str.startswith, about_ids, notes)), conversion.notes
    api.run(conversion)
    convert(tmp_path / "nt", tmp_path / "across", "--to", "nanotron", "--tp", 1)
    for folder in (tmp_path / "nt", tmp_path / "across"):
        trainer = yaml.safe_load((folder / "config.yaml").read_text())["model"]["model_config"]
        for config in (trainer, json.loads((folder / "model_config.json").read_text())):
            assert tuple(config[key] for key in IDS) == (*written, None)
        back = api.plan(folder, tmp_path / f"back_{folder.name}", to="hf")
        assert not [note for note in back.notes if "_token_id" in note]
        api.run(back)
        assert ids_of(tmp_path / f"back_{folder.name}") == ids_of(source)
        for pair in ((source, folder), (folder, tmp_path / "back_nt"), (source, tmp_path / "back_nt")):
            convert("verify", *pair)


def test_without_a_manifest_the_way_back_says_where_the_ids_are_from(tmp_path):
    source = make_source(tmp_path / "hf", config={"eos_token_id": [2, 3], "pad_token_id": 4})
    convert(source, tmp_path / "nt", "--tp", 2)
    (tmp_path / "nt" / MANIFEST).unlink()
    back = api.plan(tmp_path / "nt", tmp_path / "back", to="hf", vocab_size=11)
    assert [note for note in back.notes if note.startswith("bos_token_id 1, eos_token_id 2 are those of model_config")]
    api.run(back)
    assert ids_of(tmp_path / "back") == {"bos_token_id": 1, "eos_token_id": 2}
    assert call("verify", source, tmp_path / "nt", "--quiet") == 0
    assert call("verify", source, tmp_path / "back", "--quiet") == 5


def test_an_id_that_was_edited_in_the_checkpoint_counts(tmp_path):
    """What the manifest keeps of the model is then no more than what it was."""
    convert(make_source(tmp_path / "hf", config={"eos_token_id": [2, 3]}), tmp_path / "nt")
    config = json.loads((tmp_path / "nt" / "model_config.json").read_text())
    (tmp_path / "nt" / "model_config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert ids_of(tmp_path / "back") == {"bos_token_id": 1, "eos_token_id": 7}


@pytest.mark.parametrize("key, value", [("bos_token_id", 9), ("eos_token_id", 9), ("eos_token_id", [2, 9]),
                                        ("eos_token_id", None), ("pad_token_id", 9), ("pad_token_id", None)])
def test_verify_compares_ids(tmp_path, differs, key, value):
    """Of two folders of Hugging Face, and of one with what the other's Nanotron copy keeps."""
    said = {"pad_token_id": 4}
    source, other = make_source(tmp_path / "hf", config=said), make_source(tmp_path / "other", config=said)
    edit_config(other, {key: value})
    convert(source, tmp_path / "nt", "--tp", 2)
    differs(source, other, [f"{key} is"])
    differs(other, tmp_path / "nt", [f"{key} is"])
    differs(tmp_path / "nt", other, [f"{key} is"])
    assert call("verify", source, other, "--quiet", "--allow", key) == 0


def test_a_checkpoint_that_would_freeze_rows_is_found(tmp_path, differs):
    source = make_source(tmp_path / "hf", config={"pad_token_id": 4})
    convert(source, tmp_path / "nt", "--tp", 2)
    (tmp_path / "nt" / MANIFEST).unlink()
    config = (tmp_path / "nt" / "config.yaml").read_text()
    (tmp_path / "nt" / "config.yaml").write_text(config.replace("pad_token_id: null", "pad_token_id: 4"))
    differs(source, tmp_path / "nt", ["config.yaml: pad_token_id is '4'"])
    (tmp_path / "nt" / "config.yaml").write_text(config)
    edit_json = json.loads((tmp_path / "nt" / "model_config.json").read_text()) | {"pad_token_id": 4}
    (tmp_path / "nt" / "model_config.json").write_text(json.dumps(edit_json))
    differs(source, tmp_path / "nt", ["pad_token_id is 4", "set it to null"])
    assert call("verify", source, tmp_path / "nt", "--quiet", "--allow", "pad_token_id") == 0


@pytest.mark.parametrize("value", [2.0, True, "2", [[2]], [None], {}, -2, 2**48, [1] * 1001])
def test_what_is_no_token_id_is_refused(tmp_path, capsys, value):
    source = make_source(tmp_path / "hf", config={"eos_token_id": value})
    assert call("plan", source) == 3
    assert "eos_token_id" in capsys.readouterr().err
