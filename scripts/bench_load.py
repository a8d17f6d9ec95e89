"""Peak host memory of loading a checkpoint: into shardings slice by slice, and as numpy arrays that are then placed.

python scripts/bench_load.py --megabytes 400     # bfloat16 files of about that size, eight virtual CPU devices

The devices' memory is the host's here, so the parameters themselves (float32) count in both rows; what is above them is
what loading costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS = {"slices": "slice by slice into a sharding", "arrays": "numpy arrays, then jax.device_put"}


def folder(path: Path, megabytes: float) -> None:
    import numpy as np

    from jaxrl_llm.models import hf
    from jaxrl_llm.models.config import TransformerConfig
    from jaxrl_llm.models.weights import stored

    width, layers = 1024, max(2, round(megabytes * 2**20 / 2 / (16 * 1024**2)))
    config = TransformerConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    params: dict = {}
    for parameter in stored(config):
        node, (*parents, leaf) = params, parameter.path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = np.full(parameter.whole, 0.5, np.float32)
    hf.save(path, config, params, dtype="bfloat16", shard_bytes=100 * 2**20)


def resident() -> float:
    """Megabytes of anonymous memory: what no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def measure(path: Path, way: str) -> dict[str, float]:
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxrl_llm.models import hf

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def sharding(_: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = max((i for i, n in enumerate(shape) if n % 8 == 0), key=lambda i: shape[i], default=None)
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape)))))

    jax.block_until_ready(jax.device_put(np.zeros(8), sharding("", (8,))))
    before, most, over = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    if way == "slices":
        params = hf.load(path, sharding=sharding)[1]
    else:
        arrays = hf.load(path)[1]
        params = jax.tree.map(lambda x: jax.device_put(x, sharding("", x.shape)), arrays)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    over.set()
    thread.join()
    leaves = jax.tree.leaves(params)
    return {
        "parameters": sum(x.nbytes for x in leaves) / 2**20,
        "largest": max(x.nbytes for x in leaves) / 2**20,
        "peak": most[0] - before,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=400, help="of the files")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    print("| way | parameters, MB | largest parameter, MB | peak, MB | above the parameters, MB | seconds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        folder(path, args.megabytes)
        for way, name in ROWS.items():
            command = [sys.executable, __file__, "--measure", str(path), way]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            sizes = [found["parameters"], found["largest"], found["peak"], found["peak"] - found["parameters"]]
            print(f"| {name} | {' | '.join(f'{x:.0f}' for x in sizes)} | {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
