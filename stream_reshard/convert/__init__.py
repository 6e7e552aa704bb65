"""A conversion: from options to a plan that is proved and fits in memory and on disk, and from it to a checkpoint.

- conversion: the plan with everything that its run needs
- ends:       the source and the target that the options choose
- room:       memory, open files and disk space that a run needs
- estimate:   the time of its run, from a trial of the disks
- notes:      facts about a conversion that a user may not expect
- report:     the plan and the summary of a run, for people and as JSON
"""
