"""stream_reshard: cut Hugging Face checkpoints for Nanotron's tensor, pipeline and data parallelism, in bounded memory.

Two layouts, one plan. A *layout* says what is where in one checkpoint, a *plan* says what goes where, a *job* moves it:

- errors:         the exception tree and the exit codes
- box:            half-open n-d regions
- topology:       sizes of the parallel axes, parts of a dim, pipeline stages
- stop:           a request to stop, honoured between blocks
- folder:         a folder that is held open, and who may enter what is made below it
- durable:        files and names that survive a power cut whole, or are not there
- json_text:      JSON that somebody else wrote, its faults named by key and line
- stand_ins:      what stands in place of a file, by its first bytes
- small_files:    files that somebody else made: read up to a cap, parsed with care
- identity:       what tells a file from another one, and from itself after a change
- json_stream:    a JSON object too large to be parsed at once
- header:         a safetensors file as its header tells it
- names:          names made from templates, and the way back
- model:          logical weights with their true dims
- architectures:  one small table per model family
- layouts:        one module per format
- transfer:       one block of a parameter: what to read, which pieces of it go where
- alignment:      where the data of a target file begin, so that blocks can be shared
- proof:          that a plan is right, and what is counted on the way
- plan:           a source layout against a target layout
- machine:        file systems, cores, control groups, counters of the kernel
- memory:         allowed, reserved and projected memory
- casts:          between the dtypes of weights
- tensor_file:    reading the bytes of tensor files
- sharing:        sharing blocks with the source instead of copying bytes
- target_file:    writing tensor files: shared, copied by the file system, from a mapping, or through buffers
- lanes:          one block is written while the next is read
- moving:         bringing one parameter to where it is wanted
- companions:     files that go along as they are: tokenizer, generation settings, texts of licences
- manifest:       what a finished conversion says of itself, with a digest of every file
- contents:       what stands below a folder, links and mount points not followed
- access:         what others may do with an output: no more than with what it is made of
- lock:           one run at a time writes to a destination
- journal:        which files an unfinished run has written
- removal:        only what is ours is removed
- staging:        the folder in which the destination grows, and how it becomes the destination
- jobs:           running one job
- engines:        who runs the jobs
- execute:        the run of a plan, up to the commit
- verify:         proof that two folders hold the same model, without the planner
- forward:        proof that two folders compute the same, layer by layer; needs torch
- source_digests: the source against sums made elsewhere
- destination:    what speaks against a destination
- documents:      the files beside the weights that Nanotron's trainer reads
- options:        everything a user can choose
- formats:        a checkpoint opened to be converted, and one to be written; a module knows one end only
- notes:          what will not be as it seems
- convert:        a conversion from options to plan to checkpoint
- report:         what a person reads
- inspect, diff:  what a folder holds; in what two layouts differ
- api:            what a notebook wants, and all that the command line uses
- demo:           a small Llama, converted and verified
- flags, cli:     flags; streams, signals, exit codes

Imports run one way, in this order.
"""
__version__ = "0.1.0"
