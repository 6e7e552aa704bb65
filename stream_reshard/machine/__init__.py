"""The machine under the run.

- memory: allowed, reserved and projected memory
- kernel: file systems, cores, control groups, the kernel's counters of this process
- stop:   a request to stop, which the work checks between blocks
"""
