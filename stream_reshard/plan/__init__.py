"""A source layout against a target layout: pure data, proved before anything is written.

- plan:      the jobs
- proof:     the proof of a plan, and counts made on the way
- alignment: offsets of the data in target files, chosen so that blocks can be cloned
- blocks:    one block of a parameter: the windows that are read, their parts and the places of these
"""
