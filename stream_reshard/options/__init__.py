"""Options: all that a user can choose, each declared once. Flags, keywords in Python and docs/options.md are made from
them: a field `max_memory` is the flag --max-memory and the keyword max_memory.

- conversion: options of a conversion
- checks:     options of `verify` and of a forward pass
- resources:  memory and workers, options of every command that reads weights
- declaring:  the declaration of an option
"""
from stream_reshard.options.checks import ForwardOptions, VerifyOptions
from stream_reshard.options.conversion import ALLOWABLE, Options, nanotron_flags

__all__ = ["ALLOWABLE", "ForwardOptions", "Options", "VerifyOptions", "nanotron_flags"]
