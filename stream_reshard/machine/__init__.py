"""The machine under the run.

- memory: allowed, reserved and projected memory
- kernel: file systems, cores, control groups, counters
- stop:   a request to stop, honoured between blocks
"""
