"""What others do with the same weights: one script each, `python -m benchmarks.peers.NAME SRC OUT`.

`naive` and `get_slice` do the job of this tool with Hugging Face's own library; `mergekit` and `transformers` copy the
model from Hugging Face format to Hugging Face format; `consolidate` is the inverse job, with torch's own code; `limit`
moves the bytes and does nothing else. With a whole training, `load_all` does the job of this tool, and `deepspeed`
the nearest thing to it.
"""
