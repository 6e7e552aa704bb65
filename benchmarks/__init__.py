"""Time, memory and work of stream_reshard beside other tools: `python -m benchmarks`, and `--full` for a 7B.

    synthetic  sources of real shapes, with random bits
    machine    what the machine is; the same state of its memory before every timed run
    groups     memory control groups
    images     file systems in a file, for those that share blocks
    measure    one command, its process tree watched from outside
    rounds     cases in interleaved rounds, ratios within each round
    peers/     what others do with the same weights, one script each
    sections   what is run
    tables     results as Markdown; pictures: as PNG
"""
