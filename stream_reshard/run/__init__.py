"""Running a plan: jobs move bytes, then the folder becomes the destination.

- writing: the run of a plan, up to the commit
- output:  all that will stand in a destination
- states:  the files of a training state, which jobs write together
- jobs:    one job
- moving:  one parameter, from its source files into the files of a job
- lanes:   one block is written while the next is read
- engines: executors that run the jobs
- trial:   the speed of the disks, measured before a run
"""
