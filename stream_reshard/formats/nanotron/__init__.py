"""Nanotron: one file per parameter and rank.

- rules:        topology, version, padding, stages
- config:       model_config.json in the spelling of all formats
- ranks:        the part of each rank
- weight_files: names and headers of weight files, parsed strictly
- names:        names of the files of a checkpoint
- layout:       the layout of a checkpoint
- folder:       files that count, and files that the desktop of a system left
- source:       a checkpoint opened to be converted
- target:       a checkpoint to be written
- template:     a checkpoint to be written exactly as another one is
- documents:    the files beside the weights that Nanotron's trainer reads
"""
