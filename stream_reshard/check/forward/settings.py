"""Settings: values of a model's config, each checked when it is read."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_reshard.errors import Problems, SourceError, quoted

DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Dtypes of weights that can be computed with: torch's names by safetensors'."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")
"""Names of the activations that are computed here."""

_MAX_SIZE = 1 << 31
"""Limit on every size and number in a config."""

_MAX_LAYERS = 10**5


class Settings:
    """Values of a config by key; a problem is collected for each invalid one."""

    def __init__(self, raw: Mapping[str, Any], name: str, problems: Problems, defaults: Mapping[str, Any] = {}):
        """`name`: of the file, for messages; `defaults`: values of keys that are absent or null."""
        self.raw, self.name, self.problems, self.defaults = raw, name, problems, defaults

    def size(self, key: str, default: int | None = None) -> int:
        """A positive int; 1 in place of an invalid value."""
        return int(self._positive(key, self._value(key, default), int, 1))

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float; 1 in place of an invalid value."""
        return float(self._positive(key, self._value(key, default), float, 1.0))

    def flag(self, key: str, default: bool) -> bool:
        """True or false; false in place of an invalid value."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.complain(f"{key} is {quoted(value)}, not true or false")
        return value is True

    def inner(self, key: str) -> Settings:
        """The object below a key; an empty one in place of an invalid value."""
        value = self.raw.get(key)
        if not isinstance(value, Mapping):
            self.complain(f"{key} is {quoted(value)}, not an object")
        return Settings(value if isinstance(value, Mapping) else {}, self.name, self.problems, self.defaults)

    def activation(self) -> str:
        """`hidden_act`."""
        name = str(self._value("hidden_act", "silu"))
        if name not in ACTIVATIONS:
            self.complain(f"hidden_act {quoted(name)} is not computed here; {', '.join(ACTIVATIONS)} are")
        return name

    def num_layers(self) -> int:
        """`num_hidden_layers`; 1 in place of an invalid value."""
        number = self.size("num_hidden_layers")
        if number > _MAX_LAYERS:
            self.complain(f"num_hidden_layers is {number}, at most {_MAX_LAYERS} are computed here")
        return number if number <= _MAX_LAYERS else 1

    def complain(self, text: str) -> None:
        """Collect a problem of the file."""
        self.problems.append(SourceError(f"{self.name}: {text}"))

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return self.defaults.get(key, default) if value is None else value

    def _positive(self, key: str, value: Any, kind: Any, instead: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < _MAX_SIZE:
            self.complain(f"{key} is {'missing' if value is None else quoted(value)}, not a positive {kind.__name__}")
            return instead
        return kind(value)
