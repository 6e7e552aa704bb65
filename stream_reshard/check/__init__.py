"""Checks of checkpoints; nothing is written.

- weights:        proof that two folders hold the same model, without the planner
- forward:        proof that two folders compute the same, layer by layer; needs torch
- inspect:        contents of a folder; inspect_lines for a person
- inspect_states: the training state in it
- diff:           differences between two layouts
- source_digests: the files of a source against sha256 sums made elsewhere
"""
