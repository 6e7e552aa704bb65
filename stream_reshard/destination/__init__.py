"""The folder that grows and becomes the destination, whole or not at all.

- refusals:   reasons to refuse a destination, and the free space on its disk
- lock:       one run at a time
- staging:    the folder in which the destination grows, and how it becomes the destination
- journal:    files that an unfinished run has written
- manifest:   facts about a finished conversion, with a digest of every file
- companions: files that go along as they are: tokenizer, generation settings, texts of licences
- contents:   entries below a folder, without following links or entering other file systems
- removal:    removing what is ours and nothing else
- access:     modes: nobody may do more with an output than with its source
"""
