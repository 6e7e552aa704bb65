"""Layouts: what is where in one checkpoint. A format is a few modules; they open headers, never weights.

- base:             Slice, Fill, Group, Layout
- hf_config:        what config.json says, in one spelling
- causes:           why a path is no checkpoint, or a folder holds no weights
- hf_shards:        the shards of a folder, and what its index says of them
- hf_causes:        why shards do not hold the model
- hf_layout:        what is where in shards
- hugging_face:     a folder of shards that is there
- hf_target:        one to be written
- nanotron:         topology, version, padding of a Nanotron checkpoint; which models it can hold
- nanotron_ranks:   what each tensor-parallel rank keeps of a parameter
- nanotron_layout:  one file per parameter and rank
- nanotron_config:  what model_config.json says
- nanotron_files:   what a weight file says of itself
- nanotron_folder:  which folder holds the checkpoint, and which of its files count
- nanotron_source:  a Nanotron checkpoint that is there
- limits, hf_limits: what a config says and no other format here can express
- differences:      in what two layouts differ
"""
