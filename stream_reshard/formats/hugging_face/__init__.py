"""Hugging Face: a config.json, and every parameter a tensor of its own in one of the shards.

- config:      config.json in the spelling of all formats
- unsupported: settings that Nanotron cannot express
- index:       the shards, and what the index says of them
- layout:      the layout of a folder of shards
- planned:     the layout of shards to be written
- folder:      a folder, opened
- card:        the model card of a folder to be written
- hub:         origin of a folder in the hub's cache
- causes:      the one cause behind many faults
- source:      a folder opened to be converted
- target:      a folder to be written
"""
