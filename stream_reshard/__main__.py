"""`python -m stream_reshard`."""
from stream_reshard.cli import script

if __name__ == "__main__":
    script()
