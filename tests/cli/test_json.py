"""Documents of --json: one on stdout, with the version of its keys and of the tool."""
import json

from sources import make_source

from stream_reshard import __version__
from stream_reshard.cli import main


def test_json_documents_state_their_version(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    commands = [("plan", source), (source, tmp_path / "nt", "--tp", "2"), ("verify", source, tmp_path / "nt"),
                ("inspect", source), ("inspect", tmp_path / "nt"), ("diff", source, source), ("demo",)]
    for words in commands:
        assert main([*map(str, words), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["format"], document["version"]) == (1, __version__), words
