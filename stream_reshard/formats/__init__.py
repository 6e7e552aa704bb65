"""Formats: one folder each; any source goes with any target.

- hugging_face, nanotron: the formats; none imports another
- registry:      the format of a folder, and opening it
- base:          Source, Target
- layout:        Slice, Fill, Group, Layout: the words in which every format says what is where
- config_reader: values taken out of a config, and complaints about them
- unsupported:   settings that another format cannot express
- differences:   differences between two layouts, in words
- causes:        folders that are no checkpoint, and why
"""
