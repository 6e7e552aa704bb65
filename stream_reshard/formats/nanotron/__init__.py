"""Nanotron: one file per parameter and rank.

- rules:        topology, version, padding, stages
- config:       model_config.json under the names that all formats share
- ranks:        the part of each rank
- weight_files: names and headers of weight files, parsed strictly
- names:        names of the files of a checkpoint
- layout:       the layout of a checkpoint
- folder:       paths of the weight files; litter of desktops is ignored
- source:       a checkpoint opened for a conversion
- target:       a checkpoint to be written
- template:     a checkpoint to be written with the files of another one
- documents:    the files beside the weights that Nanotron's trainer reads
- yaml_text:    YAML of config.yaml
"""
