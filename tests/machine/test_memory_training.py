"""A training moves within the limit, without torch, and reads each byte once."""
import json
import subprocess
import sys

import pytest
from benchmarks.synthetic_training import add_training
from running import ROOT, peak_until_it_ends
from trees import write_sparse_source

from stream_reshard import api

CODE = """import sys
from stream_reshard.cli import main
code = main(sys.argv[1:])
assert 'torch' not in sys.modules, 'torch was imported'
sys.exit(code)"""


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A training of 25 million parameters on four ranks: 350 MB, most of them states."""
    root = tmp_path_factory.mktemp("training")
    write_sparse_source(root / "hf", vocab=30_000)
    api.run(api.plan(root / "hf", root / "nt", tp=2, workers=1, max_memory="8GiB"))
    add_training(root / "nt", dp=2, zero=1)
    return root / "nt"


@pytest.mark.parametrize("flags", [("--to", "nanotron", "--tp", "4", "--zero", "0"),
                                   ("--to", "hf", "--from-masters", "--vocab-size", "30000")],
                         ids=["moves", "masters"])
def test_64_mib_are_enough(tmp_path, training, flags):
    process = subprocess.Popen([sys.executable, "-c", CODE, str(training), str(tmp_path / "out"), *flags, "--json",
                                "--max-memory", "64MiB", "--workers", "1"], stdout=subprocess.PIPE, cwd=ROOT)
    peak = peak_until_it_ends(process)
    facts = json.loads(process.stdout.read())
    assert process.returncode == 0 and facts["ok"]
    assert max(peak, facts["peak_nbytes"]) <= facts["memory"]["projected"] <= 64 * 2**20
    states = sum(path.stat().st_size for path in training.glob("optimizer/*.pt"))
    weights = sum(path.stat().st_size for path in training.glob("model/**/*.safetensors"))
    read = weights + states if "nanotron" in flags else states // 3
    assert facts["io"]["rchar"] < 1.05 * read + 20 * 2**20, "source bytes are read more than once"
