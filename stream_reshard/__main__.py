"""`python -m stream_reshard`."""
import sys

from stream_reshard.cli import main

if __name__ == "__main__":
    sys.exit(main())
