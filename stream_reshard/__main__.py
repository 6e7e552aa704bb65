"""`python -m stream_reshard`."""
import os
import sys

# Python looks for modules in the working folder first. Where that is a folder of weights, a file in it called numpy.py
# would be run; the package itself needs nothing from there, unless it is run from its own checkout.
_package = os.path.dirname(os.path.abspath(__file__))
try:
    _here = os.getcwd()
except FileNotFoundError:  # It was removed; nothing can be found there.
    _here = ""
if os.path.dirname(_package) != _here:
    sys.path[:] = [path for path in sys.path if path not in ("", _here)]

from stream_reshard.cli import script  # noqa: E402

if __name__ == "__main__":
    script()
