"""mergekit's LazyTensorLoader to its TensorWriter: a plain copy of every tensor, as its merges read and write."""
from __future__ import annotations

from mergekit.io import LazyTensorLoader, TensorWriter

from benchmarks.peers.common import folders


def main() -> None:
    """Tensor by tensor, in shards of the writer's default size."""
    source, output = folders(__doc__)
    loader = LazyTensorLoader.from_disk(str(source), lazy_unpickle=False)
    with TensorWriter(str(output)) as writer:
        for name in loader.index.tensor_paths:
            writer.save_tensor(name, loader.get_tensor(name))


if __name__ == "__main__":
    main()
