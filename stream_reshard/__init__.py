"""stream_reshard: cut Hugging Face checkpoints for Nanotron's tensor, pipeline and data parallelism, in bounded memory.

Two layouts, one plan. A *layout* says what is where in one checkpoint, a *plan* says what goes where, a *job* moves it:

- errors:        the exception tree and the exit codes
- box:           half-open n-d regions
- topology:      sizes of the parallel axes, parts of a dim, pipeline stages
- header:        a safetensors file as its header tells it
- model:         logical weights with their true dims
- architectures: one small table per model family
- layouts:       one module per format
- plan:          a source layout against a target layout
- memory:        allowed, reserved and projected memory
- transfer:      one block of a parameter: what to read, which pieces of it go where
- tensor_file:   reading and writing the bytes of tensor files
- execute:       jobs, the staging folder, the commit
- engines:       who runs the jobs
- documents:     the files beside the weights that Nanotron's trainer reads
- convert:       a conversion from options to plan to checkpoint
- report:        what a person reads
- cli:           flags, streams, exit codes

Imports run one way, in this order.
"""
__version__ = "0.1.0"
