"""Running a plan: jobs move bytes, then the folder becomes the destination.

- output:  the run of a plan, up to the commit
- jobs:    one job
- moving:  bringing one parameter to where it is wanted
- lanes:   one block is written while the next is read
- engines: whoever runs jobs: any executor
"""
