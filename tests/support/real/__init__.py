"""The real Nanotron as a judge, on a machine without a GPU.

ranks.py         forks the ranks of the next two
check.py         save, load, compare, parse with whichever nanotron is importable
train.py         the same for a few steps of Nanotron's own trainer
launch.py        what a test calls: starts the two above, reads their results; and starts the converter
nanotron_cpu.py  builds Nanotron's own process groups and model
stand_ins.py     CPU versions of the GPU-only packages that Nanotron imports
expected.py      what every parameter must hold, told from the Hugging Face weights
trees.py         compares two checkpoint folders file by file, without Nanotron
models.py        makes the Hugging Face models, and transformers' logits for them

check.py and train.py run in processes of their own, because the stand-ins change torch for good.
"""
