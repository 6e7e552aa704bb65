"""Hugging Face models to convert, and transformers' logits for them. For processes without the stand-ins."""
import torch
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM)

SMALL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
             vocab_size=320, max_position_embeddings=128, rms_norm_eps=1e-5)


def save_llama(folder, **changes):
    """A small Llama with grouped queries, untied, in several shards."""
    return save_random(LlamaForCausalLM(LlamaConfig(**SMALL | changes)), folder)


def save_padded_llama(folder, **changes):
    """Its token for padding is past the rows that one of two tensor-parallel ranks has."""
    return save_llama(folder, pad_token_id=310, **changes)


def save_tied_llama(folder, **changes):
    """Tied embeddings, and a vocabulary that no tensor-parallel size divides."""
    return save_llama(folder, tie_word_embeddings=True, vocab_size=323, num_hidden_layers=4, **changes)


def save_qwen2(folder, **changes):
    """A small Qwen2: it has q, k and v biases."""
    return save_random(Qwen2ForCausalLM(Qwen2Config(**SMALL | {"num_hidden_layers": 4} | changes)), folder)


def save_first_layers(whole, folder, layers):
    """The first layers of a saved model, as transformers itself takes and saves them."""
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def save_random(model, folder):
    """Every parameter is random, norms and biases too, so that a wrong one shows; in bf16."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, param in model.named_parameters():
            base = 1.0 if "norm" in name else 0.0
            param.copy_(base + 0.1 * torch.randn(param.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


def save_smollm2(gguf, folder):
    """SmolLM2-135M-Instruct out of a GGUF file, as Hugging Face shards of up to 100 MB in bf16: real weights, tied."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def tokens(hf_folder, text):
    """Token ids of a text by the tokenizer in the folder: (1, length)."""
    return AutoTokenizer.from_pretrained(hf_folder)(text, return_tensors="pt").input_ids


def random_tokens(vocab_size, shape=(2, 24)):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(3))


def save_logits(hf_folder, path, ids=None):
    """Writes token ids and transformers' float32 logits for them, for check.py; returns its loss on them."""
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    ids = random_tokens(model.config.vocab_size) if ids is None else ids
    with torch.no_grad():
        out = model(ids, labels=ids)
    save_file({"input_ids": ids, "logits": out.logits.contiguous()}, path)
    return out.loss.item()
