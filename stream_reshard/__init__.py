"""stream_reshard: cut Hugging Face checkpoints for Nanotron's tensor, pipeline and data parallelism, in bounded memory.

Two layouts, one plan. A *layout* says what is where in one checkpoint, a *plan* says what goes where, a *job* moves it.
A format is a module that makes a layout; resume, verify, dry run, memory projection and several workers are properties
of the one value, the plan.

The wings, from the user's side down; each has a map of its modules in its own docstring:

- cli:         the command line; uses nothing but `api`
- api:         the interface for programs and notebooks
- convert:     from options to a plan to a checkpoint
- check:       reads checkpoints, writes nothing: verify, forward, inspect, diff
- run:         moves bytes
- plan:        a source layout against a target layout; pure
- formats:     what is where; one folder per format
- destination: the folder that grows and becomes the destination
- storage:     bytes on a disk
- options:     everything a user can choose, each declared once
- report:      the one shape of all results
- model:       what a model is
- machine:     what the run stands on
- errors:      the exception tree and the exit codes
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_reshard import api
    from stream_reshard.convert.conversion import Conversion
    from stream_reshard.convert.report import Result
    from stream_reshard.errors import Refused, StreamReshardError
    from stream_reshard.machine.stop import Stop
    from stream_reshard.options import ForwardOptions, Options, VerifyOptions
    from stream_reshard.report import Report

__version__ = "0.2.0"

__all__ = ["Conversion", "ForwardOptions", "Options", "Refused", "Report", "Result", "Stop", "StreamReshardError",
           "VerifyOptions", "__version__", "api"]

_HOMES = {"Conversion": "convert.conversion", "Result": "convert.report", "Refused": "errors",
          "StreamReshardError": "errors", "Stop": "machine.stop", "Options": "options", "ForwardOptions": "options",
          "VerifyOptions": "options", "Report": "report"}
"""Module of each public name."""

WINGS = ("cli", "api", "convert", "check", "run", "plan", "formats", "destination", "storage", "options",
         "report", "model", "machine", "errors")
"""A wing imports only what stands behind it."""


def __dir__() -> list[str]:
    """The public names alone: what a notebook offers."""
    return __all__


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: the package's own modules must not import all of it first."""
    from importlib import import_module
    if name == "api":
        return import_module("stream_reshard.api")
    if name in _HOMES:
        return getattr(import_module(f"stream_reshard.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'stream_reshard' has no attribute {name!r}")
