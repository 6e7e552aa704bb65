"""Formats: a checkpoint of one, opened to be converted; one to be written, with all that its readers want beside it.

- base:              Source, Target
- from_hugging_face, from_nanotron: opening one
- to_hugging_face, to_nanotron:     what is to be written

A module knows one end only: any source goes with any target.
"""
