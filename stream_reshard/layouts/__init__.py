"""Layouts: what is where in one checkpoint. A format is one module; it opens headers, never weights.

- base:            StoredTensor, Slice, Fill, TensorFile, Layout
- hugging_face:    a folder of safetensors shards with config.json
- hf_config:       what config.json says, in one spelling
- nanotron:        one file per parameter and rank, to be written
- nanotron_limits: what of a Hugging Face config Nanotron cannot express
"""
