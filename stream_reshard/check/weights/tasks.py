"""Tasks: the parts of a comparison that read files (one per digest, one per parameter), and their execution."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from stream_reshard.check.weights.agreement import digest_difference
from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import Compared, Rule, compare
from stream_reshard.check.weights.files import FilesOfManifest
from stream_reshard.destination.manifest import FileDone
from stream_reshard.machine.stop import Stop
from stream_reshard.run import engines
from stream_reshard.storage.source_file import digest_of

Task = Callable[[], Compared]


def weight_tasks(source: Checkpoint, copy: Checkpoint, rule: Rule, manifest_files: FilesOfManifest | None,
                 buffer_nbytes: int, stop: Stop) -> Iterator[Task]:
    """One task per parameter of both checkpoints. The digest of a file of the manifest comes just before the first
    parameter in the file, so that the parameter is read from the page cache."""
    for name in shared(source, copy):
        if manifest_files is not None:
            for path in copy.weights.paths_of(name):
                if file := manifest_files.take(path):
                    yield partial(_digest, copy.root, file, buffer_nbytes, stop)
        yield partial(compare, name, source, copy, rule, stop)


def digest_tasks(root: Path, manifest_files: FilesOfManifest, buffer_nbytes: int, stop: Stop) -> Iterator[Task]:
    """One task per file of the manifest that has none yet."""
    return (partial(_digest, root, file, buffer_nbytes, stop) for file in manifest_files.rest())


def shared(source: Checkpoint, copy: Checkpoint) -> Iterator[str]:
    """Names of the parameters of both checkpoints."""
    return (name for name in copy.weights if name in source.weights)


def _digest(root: Path, file: FileDone, buffer_nbytes: int, stop: Stop) -> Compared:
    if file.xxh3_128 is None:
        return Compared(0, digest_difference(root, file, None))
    nbytes = (root / file.path).stat().st_size
    digest = digest_of(root, file.path, memoryview(bytearray(min(buffer_nbytes, max(nbytes, 1)))), stop)
    return Compared(0, digest_difference(root, file, digest), is_digest=True)


def run(tasks: Iterable[Task], num_tasks: int, num_workers: int, stop: Stop,
        progress: Callable[[int, int], None]) -> Iterator[Compared]:
    """Results of the tasks, in the order in which they finish; `progress(done, total)` counts tasks."""
    with ThreadPoolExecutor(num_workers) as executor, closing(engines.run_all(executor.submit, tasks, stop,
                                                                              2 * num_workers)) as results:
        for num_done, (_, compared) in enumerate(results, 1):
            progress(num_done, num_tasks)
            stop.check()
            yield compared
