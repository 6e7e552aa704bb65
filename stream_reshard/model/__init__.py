"""A model, before any format splits, fuses or transposes it.

- parameters:    logical weights with their true dims
- architectures: one small table per model family
- names:         names made from templates, and the template of a name
- truncation:    the first layers of a model in place of all
- topology:      sizes of the parallel axes, parts of a dim
- box:           half-open n-d regions
"""
