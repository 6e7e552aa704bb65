"""No pickle, module or template that lies in a source or a copy is run, or even opened."""
import json
import os
import pickle
import shutil
import subprocess
import sys

from running import ROOT, in_child
from sources import edit_config, make_source


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def plant(root, canary):
    """Everything that some loader would run: pickles, modules, a config that names modules, a template."""
    (root / "random").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "random/rng.pt", "optimizer.pth", "data.pkl", "model.ckpt"):
        (root / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("modeling_x", "configuration_x", "tokenization_x", "setup", "conftest",
                 "sitecustomize", "usercustomize", "torch", "safetensors", "numpy", "xxhash", "psutil", "tqdm", "yaml",
                 "stream_reshard"):
        (root / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    template = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % canary
    (root / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "chat_template": template}))
    (root / "chat_template.jinja").write_text(template)
    edit_config(root, {"auto_map": names, "trust_remote_code": True, "_name_or_path": f"; touch {canary}"})


def test_nothing_of_a_source_is_run(tmp_path):
    """Plan, conversion, verification, inspection, as the installed command starts, the source as working folder."""
    root, canary, copy = make_source(tmp_path / "hf"), tmp_path / "canary", tmp_path / "nt"
    plant(root, canary)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stream_reshard.cli import script; script()"
    for words in (["plan", "."], [".", copy], ["verify", ".", copy], ["inspect", "."], ["inspect", copy]):
        command = [sys.executable, "-I", "-c", start, *map(str, words)]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert run.returncode == 0 and not canary.exists(), (words, run.stderr, canary.exists())
    (copy / "stream_reshard.json").unlink()
    shutil.copytree(root / "random", copy / "random")
    runs = [in_child(*words)
            for words in (["plan", root], [root, tmp_path / "nt2"], ["verify", root, copy], ["inspect", copy])]
    assert [run.code for run in runs] == [0] * 4 and not canary.exists()
    opened = {os.path.splitext(path)[1] for run in runs for path in run.opened
              if path.startswith((f"{root}/", f"{copy}/"))}
    assert opened <= {".json", ".safetensors", ".yaml", ".jinja", ""}, opened
    pickle.loads((root / "model.pt").read_bytes()).close()
    assert canary.exists(), "the canary cannot sing"


def test_no_module_of_the_working_folder_is_run(tmp_path):
    """`python -m` looks there first; all that it may find is the package itself."""
    root, canary = make_source(tmp_path / "hf"), tmp_path / "canary"
    for name in ("safetensors", "numpy", "xxhash", "psutil", "tqdm", "yaml", "json", "torch", "ctypes"):
        (root / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    run = subprocess.run([sys.executable, "-m", "stream_reshard", ".", tmp_path / "nt", "--quiet"], cwd=root,
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0 and not canary.exists(), run.stderr
