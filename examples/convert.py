"""stream_reshard from Python, step by step: a script for a terminal, or cells for a notebook.

It runs as it is, on a small Llama with random weights, without a network: `python examples/convert.py FOLDER`.
"""
# %% Folders. For a model of your own, set `source` to its folder.
import sys
from pathlib import Path

from stream_reshard import Refused, api
from stream_reshard.cli.demo import CONFIG, write_random_source

root = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
source, nanotron, back = root / "llama", root / "nanotron", root / "back"
if not source.exists():
    write_random_source(source, CONFIG)

# %% The plan: what goes where, what it takes. Nothing is written yet.
conversion = api.plan(source, nanotron, tp=2, pp=2, max_memory="256MiB")
print(conversion)

# %% A plan that cannot work says why, all at once.
try:
    api.plan(source, nanotron, tp=3)
except Refused as refused:
    for problem in refused.problems:
        print(type(problem).__name__, problem)

# %% The conversion. A notebook draws a bar; after a stop, the same cell goes on where it was.
result = api.run(conversion, progress=True)
print(result)

# %% The proof that both folders hold the same model.
print(api.verify(source, nanotron))

# %% What is in the folder, as data.
contents = api.inspect(nanotron).facts
print(contents["family"], contents["topologies_tp_pp"], contents["stages"])

# %% Back to Hugging Face, and the proof that nothing was lost.
api.run(api.plan(nanotron, back, to="hf"))
print(api.verify(source, back))
