"""pytorch_model*.bin is a source like any other: streamed, never unpickled, with the same output as safetensors."""
import json
import shutil
import subprocess
import sys
from collections import OrderedDict

import pytest
from attempts import kill_in_the_middle, num_kept
from conversions import convert, tree
from faults import Case
from forwards import PLAIN, save_model
from pickles import BIN, BIN_INDEX, EMBEDDING, HEAD, NORM, ONE, TWO, Q, files, pair, pickle_shards, tensors_of
from refusals import told
from running import ROOT, call, in_child
from sources import make_source
from torch_files import saved

from stream_reshard import api
from stream_reshard.errors import SourceError

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file

MODELS = {"llama": {}, "tied": {"tied": True}, "qwen2": {"family": "qwen2"}, "qwen2_moe": {"family": "qwen2_moe"}}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_that_of_safetensors(tmp_path, model, num_shards):
    """To both formats; and verify takes either for the other."""
    root, pickled = pair(tmp_path, num_shards=num_shards, **MODELS[model])
    for source in (root, pickled):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2, "--pp", 2)
        convert(source, tmp_path / f"hf_{source.name}", "--to", "hf")
    for made in ("nt", "hf"):
        assert files(tmp_path / f"{made}_hf") == files(tmp_path / f"{made}_bin")
    assert call("verify", pickled, tmp_path / "nt_hf") == 0 and call("verify", root, tmp_path / "nt_bin") == 0
    assert call("verify", pickled, tmp_path / "hf_bin") == 0 and call("verify", root, tmp_path / "hf_bin") == 0
    assert call("verify", tmp_path / "nt_bin", pickled) == 0


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}),
    lambda tensors: tensors.update({HEAD: torch.nn.Parameter(tensors[EMBEDDING].detach())}),
    lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()})], ids=["one tensor", "one storage", "a copy"])
def test_a_tied_head_may_be_there(tmp_path, change):
    root, pickled = pair(tmp_path, change, tied=True)
    for source in (root, pickled):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2)
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")
    assert f"ignored tensor {HEAD}: tied to {EMBEDDING}" in api.plan(pickled).notes


def test_a_tied_head_of_its_own_is_refused(tmp_path, capsys):
    _, pickled = pair(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}), tied=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in told(capsys, "plan", pickled)


def test_one_storage_may_hold_everything(tmp_path):
    """Tensors are views of it, and two of them are the same one, of a model that is not tied."""
    def joined(tensors):
        whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
        begin = 0
        for key, tensor in tensors.items():
            tensors[key] = whole[begin:begin + tensor.numel()].view(tensor.shape)
            begin += tensor.numel()
        tensors[HEAD] = tensors[EMBEDDING]

    _, pickled = pair(tmp_path, joined)
    whole = tensors_of(tmp_path / "hf" / "model.safetensors")
    whole[HEAD] = whole[EMBEDDING].clone()
    from safetensors.torch import save_file
    save_file(dict(whole), tmp_path / "hf" / "model.safetensors")
    for source in (tmp_path / "hf", pickled):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2)
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")


def turned(tensors, is_turned=lambda key, tensor: tensor.dim() == 2):
    for key, tensor in tensors.items():
        if is_turned(key, tensor):
            tensors[key] = tensor.t().contiguous().t()


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_transposed_matrices(tmp_path, model, num_shards):
    """A matrix that stands column by column is the same matrix, in every command."""
    root, pickled = pair(tmp_path, turned, num_shards=num_shards, **MODELS[model])
    for source in (root, pickled):
        for dtype in ("keep", "float32"):
            convert(source, tmp_path / f"{dtype}_{source.name}", "--tp", 2, "--dtype", dtype)
            assert call("verify", pickled, tmp_path / f"{dtype}_{source.name}") == 0
        convert(source, tmp_path / f"back_{source.name}", "--to", "hf")
    for dtype in ("keep", "float32"):
        assert tree(tmp_path / f"{dtype}_hf") == tree(tmp_path / f"{dtype}_bin")
    assert call("verify", pickled, root) == 0 and call("verify", root, tmp_path / "back_bin") == 0
    facts = [api.inspect(source, values=True).facts for source in (root, pickled)]
    assert facts[0]["num_nan"] == facts[1]["num_nan"] and facts[0]["dtypes"] == facts[1]["dtypes"]


def test_verify_reads_a_transposed_matrix_as_it_stands(tmp_path, capsys):
    """Another order of the same bytes is a difference."""
    _, pickled = pair(tmp_path, lambda tensors: turned(tensors, lambda key, tensor: key == Q))
    convert(tmp_path / "hf", tmp_path / "nt")
    pickle_shards(shutil.copytree(tmp_path / "hf", tmp_path / "other"),
                  lambda tensors: tensors.update({Q: tensors[Q].t()}))
    assert call("verify", pickled, tmp_path / "nt") == 0
    capsys.readouterr()
    assert call("verify", tmp_path / "other", tmp_path / "nt") == 5


STRIDES = [
    ("expanded", lambda tensors: tensors.update({Q: tensors[Q][:1].expand(16, 16)}), ["q_proj", "(0, 1)"]),
    ("stepped", lambda tensors: tensors.update({NORM: torch.zeros(32, dtype=torch.bfloat16)[::2]}), [NORM, "(2,)"]),
    ("a part of a matrix", lambda tensors: tensors.update({Q: torch.zeros(16, 20, dtype=torch.bfloat16)[:, :16]}),
     ["q_proj", "(20, 1)"]),
    ("overlapping", lambda tensors: tensors.update({Q: torch.zeros(31, dtype=torch.bfloat16).as_strided((16, 16), (1, 1))}),
     ["q_proj", "(1, 1)"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in STRIDES])
def test_other_strides_are_refused_by_name(tmp_path, capsys, change, words):
    _, pickled = pair(tmp_path, change)
    for command in (["plan", pickled], ["inspect", pickled], ["verify", pickled, tmp_path / "hf"]):
        line = told(capsys, *command)
        assert all(word in line for word in [BIN, ".contiguous()", *words]), line


def test_a_tied_head_in_another_order_is_refused(tmp_path, capsys):
    """Square and transposed, its bytes are the embedding's and its values are not."""
    root = make_source(tmp_path / "hf", tied=True, config={"vocab_size": 16})
    pickle_shards(root, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].t()}))
    assert "lm_head.weight of shape (16, 16) has the strides (1, 16)" in told(capsys, "plan", root)


def test_buffers_are_ignored(tmp_path):
    """As in safetensors: those that follow from the config, whatever their dtype and strides."""
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    root, pickled = pair(tmp_path, lambda tensors: tensors.update({key: torch.ones(1, dtype=torch.float64).expand(8)}))
    convert(pickled, tmp_path / "nt_bin")
    convert(root, tmp_path / "nt_hf")
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")
    assert f"ignored tensor {key}: follows from config.json" in api.plan(pickled).notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes(tmp_path, dtype):
    root = make_source(tmp_path / "hf")
    values = {key: torch.arange(tensor.numel()).to(dtype).view(tensor.shape)
              for key, tensor in tensors_of(root / "model.safetensors").items()}
    from safetensors.torch import save_file
    save_file(values, root / "model.safetensors")
    pickled = shutil.copytree(root, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    saved(values, pickled, BIN)
    for source in (root, pickled):
        convert(source, tmp_path / f"nt_{source.name}", "--dtype", "keep")
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")


def test_shards_may_have_other_names(tmp_path):
    root, pickled = pair(tmp_path, num_shards=2)
    (pickled / "sub").mkdir()
    (pickled / TWO).rename(pickled / "sub" / "rest.bin")
    (pickled / BIN_INDEX).write_text((pickled / BIN_INDEX).read_text().replace(TWO, "sub/rest.bin"))
    convert(pickled, tmp_path / "nt_bin")
    convert(root, tmp_path / "nt_hf")
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")


def test_safetensors_win(tmp_path):
    """As in transformers; what lies beside is not opened."""
    root = make_source(tmp_path / "hf")
    (root / BIN).write_text("nothing")
    (root / BIN_INDEX).write_text("{")
    notes = api.plan(root).notes
    assert f"pickled weights beside the safetensors, ignored: '{BIN}'" in notes
    assert not any("without unpickling" in note for note in notes)
    assert {BIN, BIN_INDEX}.isdisjoint(in_child("plan", root).opened)


def test_safetensors_that_are_gone_are_told(tmp_path, capsys):
    """A link that leads nowhere is a fault of the folder, and no reason to take other weights."""
    _, pickled = pair(tmp_path)
    (pickled / "model.safetensors").symlink_to("../blobs/0")
    assert "'model.safetensors' in " in told(capsys, "plan", pickled)


def test_what_is_done_is_told(tmp_path):
    _, pickled = pair(tmp_path, num_shards=2)
    saved({"a": torch.zeros(1)}, pickled, "pytorch_model.fp16.bin")
    note = "weights are read from pickled files (pytorch_model*.bin) without unpickling them"
    plan = api.plan(pickled)
    assert note in plan.notes and "files that no index names, ignored: 'pytorch_model.fp16.bin'" in plan.notes
    facts = api.inspect(pickled).facts
    assert note in facts["notes"] and facts["num_files"] == 2
    assert facts["nbytes"] == sum((pickled / name).stat().st_size for name in (ONE, TWO))
    assert plan.facts["source"]["nbytes"] == facts["nbytes"]


def test_sums_and_digests(tmp_path, capsys):
    """--source-sha256 knows the shards; a file that changes after the plan is noticed."""
    _, root = pair(tmp_path, num_shards=2)
    sums = subprocess.run(["sha256sum", ONE, TWO, BIN_INDEX, "config.json"], cwd=root, capture_output=True, text=True,
                          check=True).stdout
    (tmp_path / "sums").write_text(sums)
    convert(root, tmp_path / "nt", "--source-sha256", tmp_path / "sums")
    manifest = json.loads((tmp_path / "nt" / "stream_reshard.json").read_text())
    assert {ONE, TWO, BIN_INDEX, "config.json"} == manifest["run"]["identities"].keys()
    (tmp_path / "sums").write_text(sums.replace(sums[0], "0" if sums[0] != "0" else "1", 1))
    assert "is expected" in told(capsys, "plan", root, "--source-sha256", tmp_path / "sums")
    plan = api.plan(root, tmp_path / "late")
    with open(root / ONE, "ab") as stream:
        stream.write(b"0")
    with pytest.raises(SourceError, match="changed"):
        api.run(plan)


def test_a_killed_run_goes_on(tmp_path):
    """From pickled shards to the same folder; what was durable is kept."""
    pickle_shards(make_source(tmp_path / "hf", num_shards=2, config={"vocab_size": 13}))
    case = Case(tmp_path)
    kill_in_the_middle(case)
    assert num_kept(case) > 0 and case.tree() == case.wanted


def test_diff_and_copies(tmp_path):
    root, pickled = pair(tmp_path, num_shards=2)
    other = shutil.copytree(pickled, tmp_path / "other")
    assert api.diff(pickled, other).facts["same"]
    assert any(f"'{ONE}'" in line for line in api.diff(root, pickled).lines)
    assert call("verify", root, pickled) == 0
    saved({}, pickled, "pytorch_model.fp16.bin")
    assert call("verify", root, pickled) == 5


def test_a_pickle_beside_the_copy_is_told(tmp_path, capsys):
    _, pickled = pair(tmp_path)
    convert(pickled, tmp_path / "out", "--to", "hf")
    shutil.copy(pickled / BIN, tmp_path / "out")
    assert call("verify", pickled, tmp_path / "out") == 5
    assert f"'{BIN}' is extra" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "qwen2_moe"])
def test_models_of_transformers(tmp_path, name, capsys):
    """What transformers saved before it wrote safetensors: its state_dict, tied head and all. It computes the same."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM
    root = save_model(tmp_path / "hf", *PLAIN[name])
    state = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16).state_dict()
    assert (state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()) == (name == "tied")
    pickled = shutil.copytree(root, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    if name == "qwen2_moe":  # transformers 5 fuses experts in memory, and takes them apart when it saves.
        state = OrderedDict((key, value) for path in sorted(root.glob("*.safetensors"))
                            for key, value in load_file(path).items())
    saved(state, pickled, BIN)
    for source in (root, pickled):
        convert(source, tmp_path / f"nt_{source.name}", "--tp", 2)
    assert tree(tmp_path / "nt_hf") == tree(tmp_path / "nt_bin")
    assert call("verify", pickled, tmp_path / "nt_bin", "--forward") == 0, capsys.readouterr().err


def test_a_forward_pass_of_shards(tmp_path, capsys):
    pytest.importorskip("transformers")
    root = save_model(tmp_path / "hf", *PLAIN["llama"])
    convert(root, tmp_path / "nt")
    by_file = {path.name.replace("safetensors", "bin"): load_file(path) for path in root.glob("*.safetensors")}
    pickled = shutil.copytree(root, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    for name, tensors in by_file.items():
        saved(tensors, pickled, name)
    index = {"weight_map": {key: name for name, tensors in by_file.items() for key in tensors}}
    (pickled / BIN_INDEX).write_text(json.dumps(index))
    assert len(by_file) > 1 and call("verify", pickled, tmp_path / "nt", "--forward") == 0
    name, tensors = next((name, tensors) for name, tensors in by_file.items() if Q in tensors)
    turned(tensors, lambda key, tensor: key == Q)
    saved(tensors, pickled, name)
    capsys.readouterr()
    assert call("verify", pickled, tmp_path / "nt", "--forward") == 3
    assert f"{Q} does not stand row by row in {name}" in capsys.readouterr().err


@pytest.mark.parametrize("num_shards", [1, 2])
def test_torch_is_never_imported(tmp_path, num_shards):
    _, root = pair(tmp_path, turned, num_shards=num_shards)
    code = ("import sys; from stream_reshard.cli import main\n"
            f"for words in ([{str(root)!r}, {str(tmp_path / 'nt')!r}, '--tp', '2', '--quiet', '--verify'],\n"
            f"              ['verify', {str(root)!r}, {str(tmp_path / 'nt')!r}], ['inspect', {str(root)!r}]):\n"
            "    assert main(words) == 0, words\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
