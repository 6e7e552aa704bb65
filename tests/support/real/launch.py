"""What the tests call: the converter, and check.py or train.py on several ranks, in their own processes."""
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
ORACLE = REPOSITORY.parent / "shared" / "oracle"
"""Where training_real.py lies, which drives Nanotron's trainer on a CPU."""
NANOTRON_REPO = os.environ.get("NANOTRON_REPO")


def missing(*modules):
    """Why these tests cannot run here; empty when they can."""
    names = ("torch", "transformers", "yaml", "dacite", *modules)
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def missing_release():
    """Why the release of Nanotron on PyPI cannot be asked."""
    if missing("nanotron"):
        return missing("nanotron")
    version = importlib.metadata.version("nanotron")
    return "" if version == "0.4" else f"nanotron {version} is installed, these tests are for 0.4"


def missing_repo():
    """Why a checkout of Nanotron cannot be asked."""
    if not NANOTRON_REPO:
        return "NANOTRON_REPO does not name a checkout of github.com/huggingface/nanotron"
    return missing("datasets", "einops")


def missing_trainer():
    """Why the trainer of a checkout cannot be asked about whole trainings."""
    if not (ORACLE / "training_real.py").is_file():
        return "the oracle of trainings is not beside this checkout"
    return missing_repo()


def convert(source, destination, *flags):
    """Runs the command line of the converter; its messages are in the exception when it fails."""
    command_line(source, destination, "--quiet", *flags)
    return destination


def command_line(*words):
    """Runs `python -m stream_reshard` with the words, from the repository when it is not installed."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)]))
    run([sys.executable, "-m", "stream_reshard", *map(str, words)], {"PYTHONPATH": path})


def nanotron(*steps, ranks, repo=None, script="check.py", timeout=300):
    """Runs steps of check.py, or of another script of this folder, in one start; returns their results. Uses the checkout `repo`, else what is installed."""
    words = [str(word) for step in steps for word in ("+", *step)][1:]
    command = [sys.executable, str(HERE / "ranks.py"), str(ranks), script, *words]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    if repo:
        environment |= {"PYTHONPATH": f"{Path(repo) / 'src'}{os.pathsep}{ORACLE}", "NANOTRON_REPO": str(repo)}
    finished = run(command, environment, check=False, timeout=timeout)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    if len(results) < len(steps) or (finished.returncode and all(result["ok"] for result in results)):
        first_error = finished.stderr[max(0, finished.stderr.find("Traceback")):]
        raise AssertionError(f"{script} stopped after {results}\n{finished.stdout[-3000:]}\n{first_error[:6000]}")
    return results


def run(command, environment, check=True, timeout=300):
    """A child process; on a timeout it is told to end, and its ranks go with it."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.terminate()
        stdout, stderr = child.communicate()
        output = f"{stdout[-3000:]}\n{stderr[-3000:]}"
        raise AssertionError(f"still running after {timeout} s: {command}\n{output}") from None
    if check and child.returncode:
        raise AssertionError(f"exit code {child.returncode}: {command}\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)
