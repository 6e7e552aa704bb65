"""Memory and workers: options of every command that reads weights."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stream_reshard.machine import memory
from stream_reshard.machine.kernel import num_cores
from stream_reshard.options.declaring import RUN, Declared, option

Dtype = Literal["keep", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Resources(Declared):
    """Options of every command that reads weights."""

    max_memory: int = option(memory.DEFAULT_ALLOWED, "limit on the peak resident set of the whole process tree, the "
                             "interpreter included", metavar="SIZE", parse=memory.parse_nbytes, least=1, shown="512MiB",
                             group=RUN)
    workers: int | None = option(None, "number of parallel jobs; all share --max-memory, and the result does not "
                                 "depend on their number", metavar="N", least=1,
                                 shown="an eighth of the available cores, from 1 to 8", group=RUN)

    @property
    def allowed_memory(self) -> int:
        """`max_memory` in bytes, limited to the memory of the machine or its control group."""
        return min(self.max_memory, memory.machine_limit())

    @property
    def num_workers(self) -> int:
        """`workers`, or the number that measured best."""
        return self.workers or memory.default_workers(self.allowed_memory, num_cores())
