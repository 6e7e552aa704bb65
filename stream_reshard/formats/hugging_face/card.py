"""The model card of a folder that was made from another checkpoint (README.md, as the hub shows it)."""
from __future__ import annotations

from pathlib import Path

from stream_reshard import __version__
from stream_reshard.errors import shell_word
from stream_reshard.formats.base import Source
from stream_reshard.machine.memory import big
from stream_reshard.model.truncation import layers_text

CARD_NAME = "README.md"


def model_card(source: Source, dtype: str, destination: Path) -> bytes:
    """A card with base model, origin, command and versions. Its front matter is that of the hub's model cards."""
    origin, layout = source.origin or {}, source.layout
    base = [f"base_model: {origin['repo']}"] if origin else []
    front = ["---", "library_name: transformers", *base, "tags:", "- nanotron", "- stream_reshard", "---"]
    command = " ".join(map(shell_word, ("stream-reshard", source.root.name, destination.name, "--to", "hf")))
    facts = [f"- family: {source.family.hugging_face_class}, {big(layout.model.num_elements)} parameters, {dtype}",
             f"- made from: `{source.root.name}`, a {layout.format} checkpoint" + (
                 f" of format {layout.facts['version']}" if "version" in layout.facts else ""),
             f"- made by: stream_reshard {__version__}, `{command}`"]
    if origin:
        facts.append(f"- base model: {origin['repo']}, commit {origin['commit']}")
    config, content = source.config, "Weights"
    if config.whole_num_hidden_layers is not None:
        text = layers_text(config.num_hidden_layers, config.whole_num_hidden_layers)
        content = f"A trial of a conversion, not a whole model: embedding, {text}, final norm and head,"
    return "\n".join([*front, "", f"# {destination.name}", "", f"{content} in the layout of Hugging Face.", "", *facts,
                      ""]).encode(errors="backslashreplace")
