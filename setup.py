"""Packaging; everything is declared in setup.cfg. A build adds completions for shells, made from the parser."""
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCompletions(build_py):
    """Ships completions with the package; an editable install has none, and needs no shtab."""

    def run(self):
        """Build the modules, then write a file for each shell."""
        super().run()
        if not getattr(self, "editable_mode", False):
            sys.path.insert(0, str(Path(__file__).parent))
            from stream_reshard.cli.completions import made
            from stream_reshard.cli.flags import SHELLS
            folder = Path(self.build_lib) / "stream_reshard" / "cli" / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            for shell, name in SHELLS.items():
                (folder / name).write_text(made(shell))


setup(cmdclass={"build_py": BuildWithCompletions})
