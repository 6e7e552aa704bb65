"""CPU versions of what Nanotron takes for granted: flash-attn, triton, a CUDA device, NCCL.

Nanotron imports these when its modules are imported, and names the device "cuda" in its source. Nothing of Nanotron's
own code that builds, cuts, saves or loads a model is replaced, so what it says about a checkpoint stays its own word.
"""
import importlib
import importlib.machinery
import sys
import types

import torch
import torch._dynamo  # looks for the real triton, so it has to be imported before the empty one  # noqa: F401
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Nothing(types.ModuleType):
    """A module, function or decorator that only has to be there: it answers everything with itself."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__ = []
        self.__version__ = "2.7.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else self


def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
              causal=False, **_):
    """Attention of sequences that are packed one behind the other: (tokens, heads, head_dim), as in flash-attn."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs = []
    for q_begin, q_end, k_begin, k_end in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        heads_first = [part.transpose(0, 1)[None] for part in (q[q_begin:q_end], k[k_begin:k_end], v[k_begin:k_end])]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def attention_kv_packed(q, kv, *args, return_attn_probs=False, **kwargs):
    """The same with (tokens, 2, heads, head_dim) keys and values."""
    out = attention(q, kv[:, 0], kv[:, 1], *args, **kwargs)
    return (out, torch.zeros(1), None) if return_attn_probs else out


class RotaryEmbedding(torch.nn.Module):
    """Turns pairs of numbers, as complex numbers: neighbours when interleaved, else i and i + head_dim / 2."""

    def __init__(self, dim, base=10000.0, interleaved=False, *_, **__):
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def rotate(self, x):
        """x is (batch, sequence, heads, head_dim)."""
        frequency = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)[:, None]
        shape = (self.dim // 2, 2) if self.interleaved else (2, self.dim // 2)
        pairs = x.float().unflatten(-1, shape)
        pairs = pairs if self.interleaved else pairs.transpose(-1, -2)
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        turned = turned if self.interleaved else turned.transpose(-1, -2)
        return turned.flatten(-2).to(x.dtype)

    def forward(self, q, kv, **_):
        return self.rotate(q), torch.stack([self.rotate(kv[:, :, 0]), kv[:, :, 1]], dim=2)


def norm(x, weight, bias, eps=1e-6, is_rms_norm=False, **_):
    """flash-attn's fused norm; in float32 inside, like the kernel."""
    assert is_rms_norm and bias is None, "of the models that are converted, none has another norm"
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


class OnCpu(TorchFunctionMode):
    """Every "cuda" that reaches torch becomes "cpu"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {key: self.moved(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        return func(*map(self.moved, args), **kwargs)

    @staticmethod
    def moved(value):
        names_a_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if names_a_device else value


PROVIDED = {
    "flash_attn": {},
    "flash_attn.bert_padding": {},
    "flash_attn.flash_attn_interface": {"flash_attn_varlen_func": attention,
                                        "flash_attn_varlen_kvpacked_func": attention_kv_packed},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"RotaryEmbedding": RotaryEmbedding},
    "flash_attn.modules": {},
    "flash_attn.modules.mha": {"flash_attn_varlen_kvpacked_func": attention_kv_packed},
    "flash_attn.ops": {},
    "flash_attn.ops.triton": {},
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": norm},
    "grouped_gemm": {},
    "grouped_gemm.ops": {},
    "triton": {},
    "triton.language": {},
    "triton.language.extra": {},
}


def install():
    """Puts the stand-ins in place. Call before the first import of nanotron."""
    for name, contents in PROVIDED.items():
        sys.modules[name] = module = Nothing(name)
        vars(module).update(contents)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    for name in ("set_device", "device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_, **__: 0)
    torch.compile = lambda function, *_, **__: function  # trees of 2024 compile the MLP, with triton
    OnCpu().__enter__()
    break_import_cycle()


def break_import_cycle():
    """Release 0.4 cannot be imported: its config and its logging each wait for the other, for a type annotation."""
    try:
        importlib.import_module("nanotron.config")
    except ImportError as error:
        if "LoggingArgs" not in str(error):
            raise
        for name in ("nanotron.config", "nanotron.config.config"):
            sys.modules[name] = Nothing(name)
        importlib.import_module("nanotron.logging")
        del sys.modules["nanotron.config"], sys.modules["nanotron.config.config"]
