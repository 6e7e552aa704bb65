"""The folder that grows and becomes the destination, whole or not at all.

- refusals:   reasons to refuse a destination, and the free space on its disk
- lock:       one run at a time
- staging:    the folder in which the destination grows, and how it becomes the destination
- journal:    files that an unfinished run has written
- manifest:   facts about a finished conversion, with a digest of every file
- companions: files that go along unchanged: tokenizer, generation settings, texts of licences
- contents:   entries below a folder, without following links or entering other file systems
- removal:    removing files of this tool and nothing else
- access:     modes: group and others may do no more with an output than with its source
"""
