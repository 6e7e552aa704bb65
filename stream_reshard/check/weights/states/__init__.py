"""The training state beside the weights of a Nanotron checkpoint, as `verify` reads it: without the planner.

- names:     names of the files, at a topology
- order:     the parameters of each stage, in the order by which Nanotron matches states
- cut:       the stretch of a parameter that ZeRO-1 gives each rank
- optimizer_config: the topology, and how ZeRO-1 cuts a state
- rank_file: one optimizer file, checked against the parameters that its rank holds
- schedule:  the files of the learning rate's schedule
- metadata:  steps, samples and tokens, and their sums
- state:     a training state, opened
- moved:     moments and masters as matrices that are read by rows, like the weights
- presence:  folders of which both, one or none have a training state
- agreement: two training states, in everything but tensors
- settings:  config.yaml against the state beside it
- tasks:     the parts of the comparison that read tensors and whole files

Moments and masters are further `Weights` of a checkpoint: the slices in the headers below model/ say where the rows of
a parameter stand in the shard of each rank, and the shard lies in the optimizer's files.
"""
