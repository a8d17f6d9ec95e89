"""Writes tests/golden/hf: tiny Llama, Qwen2 and Qwen3 folders and the logits transformers' PyTorch computes for them.

pip install torch==2.13.0 transformers==5.23.0 && python scripts/make_golden.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from the default .02, so that attention and gates leave their linear range
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "golden" / "hf")
    out = parser.parse_args().out
    for seed, (name, (config, model, more)) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "rope_theta": 1000.0 * (seed + 1)}
        network = model(config(**SIZES, **more, rope_parameters=rope)).eval()
        with torch.no_grad():
            # Fresh models have unit norms and zero biases, which would hide a missing one.
            for key, parameter in network.named_parameters():
                if key.endswith(("norm.weight", "layernorm.weight")):
                    parameter.uniform_(0.5, 1.5)
                elif key.endswith(".bias"):
                    parameter.normal_(std=0.5)
            tokens = torch.randint(SIZES["vocab_size"], (3, 17))
            logits = network(tokens).logits
        network.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(out / name / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
        print(out / name)


if __name__ == "__main__":
    main()
