"""transformers: from_pretrained, save_pretrained; what a converter that goes through the model class pays at least."""
from __future__ import annotations

from transformers import LlamaForCausalLM

from benchmarks.peers.common import folders


def main() -> None:
    """The dtype of the checkpoint, no weight made twice."""
    source, output = folders(__doc__)
    LlamaForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(output)


if __name__ == "__main__":
    main()
