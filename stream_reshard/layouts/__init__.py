"""Layouts: what is where in one checkpoint. A format is one module; it opens headers, never weights.

- base:            StoredTensor, Slice, Fill, TensorFile, Layout
- hugging_face:    a folder of safetensors shards with config.json
- hf_config:       what config.json says, in one spelling, and what of it Nanotron cannot express
- nanotron:        one file per parameter and rank, to be written
- nanotron_files:  the same, read back from the headers of a folder
"""
