"""Time, memory and work of stream_reshard beside other tools: `python -m benchmarks`, and `--full` for a 7B.

    machine    what the machine is; the same state of its memory before every timed run
    groups     memory control groups
    images     file systems in a file, for those that share blocks
    measure    one command, its process tree watched from outside
    rounds     cases in interleaved rounds, ratios within each round
    peers/     what others do with the same weights, one script each
    sources    synthetic sources, sized to the machine; synthetic, synthetic_training: how they are made
    bench      what all sections work with
    sections   what is run; ways: every way of this tool; training: whole trainings that move
    fits       a straight line through the runs
    tables     results as Markdown; pictures: as PNG; readme: documents about them
"""
