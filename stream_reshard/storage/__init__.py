"""Reading and writing bytes on a disk.

- header:      tensors of a safetensors file: reading its header, packing one
- source_file: reading the bytes of tensor files
- read_ahead:  requests for bytes ahead of a reader
- target_file: writing tensor files: cloned, copied by the file system, from a mapping, or through buffers
- durable:     files and names that survive a power cut whole, or are absent
- folder:      a folder held open, and modes of the files made below it
- cloning:     blocks shared with the source instead of copied bytes
- dtypes:      dtypes of weights
- casts:       casts between them
- identity:    the part of a file's status by which another file, and a change, is noticed
- small_files: small files made by others: read up to a limit, parsed with care
- json_text:   JSON made by others, with faults named by key and line
- json_stream: a JSON object too large to be parsed at once
- stand_ins:   contents in place of a file, recognized by their first bytes

and the files of torch.save, read and written without torch:

- torch_file:        a .pt file: its values, and where the bytes of its tensors stand
- torch_writer:      the bytes of a .pt file around those of its tensors
- torch_values:      tensors and storages as such a file names them
- torch_names:       the names that it may use, and what is made of them
- restricted_pickle: its values, read by an interpreter that calls nothing
- pickle_writer:     its values, written
- value_tree:        walks through them, in bounded time
- zip_file:          its container, read by byte ranges
- crc32:             checksums of pieces, combined
"""
