"""Formats: one folder each; any source goes with any target.

- hugging_face, nanotron, meta: the formats; none imports another
- registry:           recognizing the format of a folder, and opening it
- base:               Described, Source, Target
- layout:             Slice, Fill, Group, Layout: the terms in which every format states what is where
- config_json:        config.json under the names that all formats share
- config_json_limits: settings in it that Nanotron cannot express
- config_reader:      values of a config, and problems with them
- unsupported:        settings that another format cannot express
- differences:        differences between two layouts, in words
- causes:             reasons why a folder is no checkpoint
"""
