"""Meta's parts are a source like any other: streamed, never unpickled, with the output of the same model in safetensors."""
import json
import shutil
import subprocess
import sys

import pytest
from attempts import kill_in_the_middle, num_kept
from conversions import convert, tree
from faults import Case
from meta_parts import EMBEDDING, HEAD, Q, pair
from pickles import files
from running import ROOT, call

from stream_reshard import api
from stream_reshard.errors import SourceError

torch = pytest.importorskip("torch")

HEADS = {"of as many KV heads": 8, "of fewer KV heads": 4}
SCALED = {"use_scaled_rope": True}


@pytest.mark.parametrize("num_parts, embedding_dim", [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize("heads", HEADS)
def test_the_output_is_that_of_safetensors(tmp_path, num_parts, embedding_dim, heads):
    """Every file, in both formats, at a topology finer and one coarser than the parts; and verify takes either source
    for the other."""
    root, meta = pair(tmp_path, num_parts, embedding_dim, config={"num_key_value_heads": HEADS[heads]})
    for source in (root, meta):
        convert(source, tmp_path / f"fine_{source.name}", "--tp", 4, "--pp", 2, "--verify")
        convert(source, tmp_path / f"coarse_{source.name}", "--rope", "interleaved", "--dtype", "float32", "--verify")
        convert(source, tmp_path / f"back_{source.name}", "--to", "hf", "--verify")
    for made in ("fine", "coarse", "back"):
        assert files(tmp_path / f"{made}_hf") == files(tmp_path / f"{made}_meta")
        assert call("verify", meta, tmp_path / f"{made}_hf") == 0 and call("verify", root, tmp_path / f"{made}_meta") == 0
    assert call("verify", root, meta) == 0 and call("verify", tmp_path / "fine_hf", meta) == 0


def swapped_rows(parts):
    parts[0][Q][[0, 1]] = parts[0][Q][[1, 0]]


def swapped_parts(parts):
    key = "layers.1.feed_forward.w2.weight"
    parts[0][key], parts[1][key] = parts[1][key], parts[0][key]


def one_weight(parts):
    parts[-1][HEAD].view(torch.int16)[-1, -1] ^= 1


@pytest.mark.parametrize("change, word", [(swapped_rows, "self_attn.q_proj.weight"),
                                          (swapped_parts, "layers.1.mlp.down_proj.weight"), (one_weight, "lm_head")])
def test_verify_finds_other_weights(tmp_path, capsys, change, word):
    """Rows of a pair, the order of the parts, one bit of the last weight."""
    root, meta = pair(tmp_path, 2, change=change)
    convert(root, tmp_path / "nt", "--tp", 2)
    assert call("verify", meta, tmp_path / "nt") == 5
    assert word in capsys.readouterr().err


def test_views_of_one_storage(tmp_path):
    """Parts of the first release hold their matrices so."""
    def joined(parts):
        for part in parts:
            keys = [key for key in part if key.startswith("layers.0.")]
            whole = torch.cat([part[key].flatten() for key in keys])
            for key, piece in zip(keys, whole.split([part[key].numel() for key in keys])):
                part[key] = piece.view(part[key].shape)

    root, meta = pair(tmp_path, 2, change=joined)
    for source in (root, meta):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2)
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_meta")


def test_a_tied_head_is_stored_beside_the_embedding(tmp_path):
    """As in Llama 3.2, of one part; nothing in params.json says it."""
    root, meta = pair(tmp_path, tied=True, change=lambda parts: parts[0].update({HEAD: parts[0][EMBEDDING].clone()}))
    for source in (root, meta):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2, "--verify")
    assert files(tmp_path / "nt_hf") == files(tmp_path / "nt_meta")
    assert f"ignored tensor {HEAD}: tied to {EMBEDDING}" in api.plan(meta).notes


RELEASES = [
    ("Llama 1", {"norm_eps": 1e-6}, {}, (2048, 1, 2, 10000.0)), ("Llama 2", {}, {}, (4096, 1, 2, 10000.0)),
    ("Code Llama", {"rope_theta": 1e6}, {}, (16384, 1, 2, 1e6)),
    ("Llama 3", {"rope_theta": 5e5}, {"vocab_size": 128256}, (8192, 128000, 128001, 5e5)),
    ("Llama 3.1", {"rope_theta": 5e5} | SCALED, {"vocab_size": 128256}, (131072, 128000, 128001, 5e5))]


@pytest.mark.parametrize("release, params, config, wanted", [pytest.param(*row, id=row[0]) for row in RELEASES])
def test_what_params_json_leaves_out(tmp_path, release, params, config, wanted):
    """Is that of the release, as transformers' script has it, and is told."""
    sizes = {"hidden_size": 2, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
             "num_hidden_layers": 1, "vocab_size": 12}
    _, meta = pair(tmp_path, config=sizes, params=params, change=lambda parts: parts[0].update(
        {key: torch.zeros(config["vocab_size"], 2) for key in (EMBEDDING, HEAD)} if config else {HEAD: torch.ones(12, 2)}))
    plan = api.plan(meta, allow=("rope_scaling",))
    found = plan.source.config
    assert (found.max_position_embeddings, found.bos_token_id, found.eos_token_id, found.rope_theta) == wanted
    assert any(note.startswith("params.json gives no context length") and f"of {release} are taken" in note
               for note in plan.notes)


def test_config_json_is_taken_where_it_is(tmp_path):
    root, meta = pair(tmp_path, 2, config={"eos_token_id": [2, 5], "max_position_embeddings": 77})
    shutil.copy(root / "config.json", meta)
    (meta / "params.json").unlink()
    for source in (root, meta):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2, "--verify")
    assert files(tmp_path / "nt_hf") == files(tmp_path / "nt_meta")
    assert not any("of Llama 2 are taken" in note for note in api.plan(meta).notes)


def test_params_may_lie_one_deeper(tmp_path):
    """As the script reads them; what is not understood is told."""
    _, meta = pair(tmp_path)
    params = json.loads((meta / "params.json").read_text()) | {"max_seq_len": 9, "novel": 1}
    (meta / "params.json").write_text(json.dumps({"model": params}))
    assert "params.json keys not understood, ignored: 'novel'" in api.plan(meta).notes


def test_scaled_rope_is_accepted_by_name(tmp_path, capsys):
    """Into Nanotron; a new config.json would lose it without a word."""
    root, meta = pair(tmp_path, params=SCALED)
    assert call(meta, tmp_path / "nt") == 3 and "(--allow rope_scaling to" in capsys.readouterr().err
    convert(meta, tmp_path / "nt", "--allow", "rope_scaling", "--verify")
    convert(root, tmp_path / "nt_hf")
    assert tree(tmp_path / "nt") == tree(tmp_path / "nt_hf")
    capsys.readouterr()
    assert call(meta, tmp_path / "hf_2", "--to", "hf", "--allow", "rope_scaling") == 3
    assert "params.json: rope_type is 'llama3'" in capsys.readouterr().err


def test_the_first_layers(tmp_path):
    root, meta = pair(tmp_path, 2)
    for source in (root, meta):
        convert(source, tmp_path / f"nt_{source.name}", "--layers", 1, "--verify")
    assert files(tmp_path / "nt_hf") == files(tmp_path / "nt_meta")


def test_what_is_told(tmp_path, capsys):
    _, meta = pair(tmp_path, 2)
    (meta / "tokenizer.model").write_bytes(b"x")
    plan = api.plan(meta)
    assert "weights are read from Meta's parts (consolidated.*.pth) without unpickling them" in plan.notes
    assert "ignored tensor rope.freqs: follows from params.json" in plan.notes
    assert any("tokenizer.model alone" in note for note in plan.notes)
    nbytes = sum(path.stat().st_size for path in meta.glob("*.pth"))
    assert plan.facts["source"] | {"path": ""} == {"path": "", "format": "Meta", "family": "llama", "num_shards": 2,
                                                   "nbytes": nbytes}
    assert call("inspect", meta) == 0
    out = capsys.readouterr().out
    for line in ("checkpoint Meta\n", "rope       base 10000, interleaved", "in 2 files, BF16 in 42 tensors"):
        assert line in out, out


def test_identities_and_diff(tmp_path):
    """A file that changes after the plan is noticed; two folders of parts have one layout."""
    root, meta = pair(tmp_path, 2)
    convert(meta, tmp_path / "nt")
    manifest = json.loads((tmp_path / "nt" / "stream_reshard.json").read_text())
    assert manifest["run"]["identities"].keys() == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    assert api.diff(meta, shutil.copytree(meta, tmp_path / "other")).facts["same"]
    assert not api.diff(meta, root).facts["same"]
    plan = api.plan(meta, tmp_path / "late")
    with open(meta / "consolidated.01.pth", "ab") as stream:
        stream.write(b"0")
    with pytest.raises(SourceError, match="changed"):
        api.run(plan)


def test_a_killed_run_goes_on(tmp_path):
    _, meta = pair(tmp_path / "made", 4, config={"num_hidden_layers": 2})
    meta.rename(tmp_path / "hf")
    case = Case(tmp_path)
    kill_in_the_middle(case)
    assert num_kept(case) > 0 and case.tree() == case.wanted


def test_torch_is_never_imported(tmp_path):
    _, meta = pair(tmp_path, 2)
    code = ("import sys; from stream_reshard.cli import main\n"
            f"for words in ([{str(meta)!r}, {str(tmp_path / 'nt')!r}, '--tp', '2', '--quiet', '--verify'],\n"
            f"              ['verify', {str(meta)!r}, {str(tmp_path / 'nt')!r}], ['inspect', {str(meta)!r}]):\n"
            "    assert main(words) == 0, words\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_shards_of_hugging_face_are_taken_first(tmp_path):
    """As transformers takes them; the parts lie beside."""
    root, meta = pair(tmp_path, 2)
    for path in meta.iterdir():
        shutil.copy(path, root)
    assert api.plan(root).facts["source"]["format"] == "Hugging Face"
