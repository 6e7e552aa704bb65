"""Truncation: the first layers of a model in place of all, by which a conversion of a large model is tried."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stream_reshard.errors import UsageError
from stream_reshard.machine.memory import counted
from stream_reshard.model.parameters import ModelConfig

WHOLE = "whole_num_hidden_layers"
"""Key of `ModelConfig.whole_num_hidden_layers` in a config.json and in a manifest. transformers keeps keys that it does
not know; Nanotron's configs refuse them."""

_LAYER = re.compile(r"(?:model\.)*layers\.(0|[1-9]\d{0,11})\.", re.ASCII)

Truncate = Callable[[ModelConfig], ModelConfig]
"""The config of the layers to take, from that of a checkpoint."""


def untruncated(config: ModelConfig) -> ModelConfig:
    """The config itself: all layers are taken."""
    return config


def truncated(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The config of the first `layers` layers of a model; None for all. Raises UsageError where the model has no more,
    or Nanotron could not build them."""
    number, interval = config.num_hidden_layers, config.no_rope_layer
    if layers is None:
        return config
    if layers == number:
        raise UsageError(f"--layers {layers} is the whole model of {number} layers; leave it out")
    if layers > number:
        raise UsageError(f"--layers {layers}: the model has {number} layers")
    if interval and layers % interval:
        raise UsageError(f"--layers {layers} is not a multiple of {interval}: Nanotron requires it, as every "
                         f"{interval}th layer has no rotary embedding")
    return replace(config, num_hidden_layers=layers, whole_num_hidden_layers=config.whole_num_hidden_layers or number)


def truncated_like(config: ModelConfig, copy: ModelConfig | None) -> ModelConfig:
    """The config of as many layers as a copy holds, where it is a truncated copy of a model of so many layers."""
    whole = config.whole_num_hidden_layers or config.num_hidden_layers
    if copy is None or copy.whole_num_hidden_layers != whole or copy.num_hidden_layers >= config.num_hidden_layers:
        return config
    return replace(config, num_hidden_layers=copy.num_hidden_layers, whole_num_hidden_layers=whole)


def recorded(config: ModelConfig, facts: Mapping[str, Any]) -> ModelConfig:
    """The config, marked as truncated where the facts of a manifest say so."""
    whole = facts.get(WHOLE)
    return replace(config, whole_num_hidden_layers=whole) if whole and whole > config.num_hidden_layers else config


def left_out(config: ModelConfig, taken: ModelConfig) -> range:
    """The layers of a checkpoint that are not taken. `config`: of the checkpoint; `taken`: of the layers to take."""
    return range(taken.num_hidden_layers, config.num_hidden_layers)


def is_in_layers(key: str, layers: range) -> bool:
    """True for the name of a tensor in one of these layers."""
    return bool(layers and (match := _LAYER.match(key)) and int(match[1]) in layers)


def layers_text(number: int, whole: int | None) -> str:
    """A number of layers for a person, with that of the whole model where these are only its first ones."""
    return counted(number, "layer") if whole is None else f"first {number} of {counted(whole, 'layer')}"
