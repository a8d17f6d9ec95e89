"""Writes tests/golden/hf: a tiny folder of every family and what transformers' PyTorch computes for it.

pip install torch==2.13.0 transformers==5.23.0 && python scripts/make_golden.py
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import parity

SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
FOLDERS = {
    "llama": "llama, llama3 rope",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "golden" / "hf")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    for seed, (folder, family) in enumerate(FOLDERS.items()):
        sizes = {**SIZES, "layer_types": [parity.SLIDING, parity.FULL]} if "gemma" in family else dict(SIZES)
        if family == "qwen2":
            sizes["hidden_size"] = sizes.pop("head_dim") * sizes["num_attention_heads"]
        network = parity.network(family, seed, **sizes)
        texts = parity.data(SIZES["vocab_size"], seed)
        found = parity.theirs(network, texts)
        network.save_pretrained(out / folder)
        (out / folder / "generation_config.json").unlink(missing_ok=True)
        gradient = parity.summary(found.pop("gradient"))
        np.savez_compressed(out / folder / "expected.npz", **texts._asdict(), **found, gradient=gradient)
        print(out / folder)


if __name__ == "__main__":
    main()
