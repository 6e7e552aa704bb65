"""Hugging Face: a config.json, and one tensor per parameter, each in one of the shards.

- index:   the shards, and the shard of each tensor by the index
- layout:  the layout of an existing folder
- planned: the layout of a folder to be written
- folder:  reading a folder: config, shards, layout
- card:    the model card of a folder to be written
- hub:     origin of a folder in the hub's cache
- causes:  the one cause behind many faults
- source:  a folder opened for a conversion
- target:  a folder to be written
"""
