"""`verify --forward` of a model that is larger than the limit on memory: no matrix is ever whole, and a stop is soon."""
import signal
import subprocess
import sys
import time

import pytest
from conversions import convert
from running import ROOT, measured
from trees import write_sparse_source

from stream_reshard.machine.memory import parse_nbytes

pytestmark = pytest.mark.usefixtures("torch")


@pytest.fixture(scope="module")
def vast(tmp_path_factory):
    """A model whose embedding alone, 430 MB, is more than the limit on memory; it takes no room on the disk."""
    root = tmp_path_factory.mktemp("vast")
    write_sparse_source(root / "hf", 210_000)
    convert(root / "hf", root / "nt", "--tp", 2, "--max-memory", "8GiB")
    return root / "hf", root / "nt"


def test_no_matrix_is_ever_whole(vast):
    limit = "384MiB"
    code, peak, err = measured("verify", *vast, "--forward", "--quick", "--json", "--tokens", 8, "--max-memory", limit)
    assert code == 0, err
    assert parse_nbytes("100MiB") < peak <= parse_nbytes(limit) < (vast[0] / "model.safetensors").stat().st_size


def test_a_signal_ends_it_soon(vast):
    command = [sys.executable, "-m", "stream_reshard", "verify", *map(str, vast), "--forward", "--tokens", "512",
               "--max-memory", "1GiB"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (143, "error: interrupted by SIGTERM\n")
