"""The demo: a small Llama with random weights, converted to TP=2 PP=2 and verified. Needs no download and no torch."""
from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from stream_reshard.check.weights import verify
from stream_reshard.convert.conversion import plan_conversion, run_conversion
from stream_reshard.errors import DestinationError, quoted, shell_word
from stream_reshard.formats.config_json import CONFIG_NAME, SINGLE_NAME, read_config
from stream_reshard.machine.stop import Stop
from stream_reshard.model.architectures import FAMILIES, build_model
from stream_reshard.options import Options
from stream_reshard.report import Report
from stream_reshard.storage.header import pack_header

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 688,
          "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1001,
          "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}


def write_random_source(root: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A Hugging Face folder of this config, in bfloat16, one shard, with seeded random weights of a usual size."""
    import numpy as np
    root.mkdir(parents=True, exist_ok=True)
    (root / CONFIG_NAME).write_text(json.dumps(config, indent=2))
    parsed = read_config(root)
    parameters = tuple(build_model(FAMILIES[parsed.family.hugging_face_class], parsed.model).stored())
    random = np.random.default_rng(seed)
    with open(root / SINGLE_NAME, "wb") as stream:
        stream.write(pack_header([(p.hugging_face, "BF16", p.matrix_shape) for p in parameters], {"format": "pt"}))
        for parameter in parameters:
            values = random.standard_normal(parameter.num_elements, dtype=np.float32) * 0.02
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def demo(quiet: bool, keep: Path | None = None, stop: Stop | None = None) -> Report:
    """Make, convert, verify, in `keep` or in a temporary folder; the facts are those of `verify`."""
    if keep is not None:
        report = _demo(keep, quiet, stop)
        return Report(report.facts, (*report.lines, *_next_steps(keep)))
    with tempfile.TemporaryDirectory(prefix="stream_reshard_demo_") as folder:
        return _demo(Path(folder), quiet, stop)


def _demo(folder: Path, quiet: bool, stop: Stop | None) -> Report:
    source, destination = _source_in(folder), _destination_in(folder)
    if source.exists() and any(source.iterdir()):
        raise DestinationError(f"{quoted(source)} is not empty; --keep takes a new folder")
    write_random_source(source, CONFIG)
    conversion = plan_conversion(Options(source, destination, tp=2, pp=2))
    if not quiet:
        print(conversion)
    run_conversion(conversion, stop=stop)
    facts = verify(source, destination, stop=stop)
    return Report(facts, (f"demo     converted and verified {facts['num_elements']} weights: all equal",))


def _next_steps(folder: Path) -> tuple[str, str, str]:
    """The next three commands, for folders that stay."""
    source, destination, back = map(shell_word, (_source_in(folder), _destination_in(folder), folder / "back"))
    return (f"next     stream-reshard inspect {destination}",
            f"         stream-reshard verify {source} {destination}",
            f"         stream-reshard {destination} {back} --to hf")


def _source_in(folder: Path) -> Path:
    return folder / "llama"


def _destination_in(folder: Path) -> Path:
    return folder / "nanotron"
