"""A source layout against a target layout: pure data, proved before anything is written.

- plan:      the jobs
- proof:     that a plan is right, and counts made on the way
- alignment: beginnings of data in target files, so that blocks can be shared
- blocks:    one block of a parameter: stretches to read, pieces of it and their places
"""
