"""The state of a training beside its weights: moments, fp32 masters, steps, settings, schedule.

- files:     names of the files
- zero:      the part of a parameter's state that one data-parallel rank keeps (ZeRO-1)
- layout:    the place of every state in the files of one checkpoint
- entries:   the values of optimizer files: read and checked, one entry per parameter
- source:    a training state opened for a conversion
- contents:  the values of optimizer files to be written
- target:    the optimizer files to be written
- documents: configs and metadata, read and changed for another topology
- fitness:   reasons why a training cannot go on at another topology
- schedule:  the state of the learning rate
- moved:     a checkpoint to be written with its training state
"""
