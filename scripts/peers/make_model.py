"""Writes the random checkpoints that every peer loads (Hugging Face Qwen2, safetensors, tokenizer) to $BENCH_CKPT.

    BENCH_CKPT=DIR/ckpt DIR/trl/bin/python make_model.py [size ...]

Runs in TRL's environment (setup.sh). Sizes with texts that end by themselves get a second checkpoint, `<size>-tail`.
"""

from __future__ import annotations

import math
import sys

import torch
import workload as w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TAILED = ("tiny", "research")
TAIL_NEW = 128


def tokenizer(vocab: int, eos: int) -> PreTrainedTokenizerFast:
    """One character a token; private-use characters fill the vocabulary."""
    ids = {"<pad>": w.PAD_ID}
    for i in range(32, 127):
        ids[chr(i)] = len(ids)
    while len(ids) < min(vocab, eos):
        ids[chr(0xF0000 + len(ids))] = len(ids)
    ids["<eos>"] = eos
    t = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    t.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    t.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def model(size: str, eos: int | None) -> Qwen2ForCausalLM:
    c = w.SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=c["vocab"],
        hidden_size=c["hidden"],
        intermediate_size=c["inter"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=w.NORM_EPS,
        rope_parameters=dict(rope_type="default", rope_theta=float(w.ROPE_THETA)),
        tie_word_embeddings=True,
        pad_token_id=w.PAD_ID,
        bos_token_id=None,
        eos_token_id=eos,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).float()


@torch.no_grad()
def end_with_probability(m: Qwen2ForCausalLM, eos: int, probability: float) -> float:
    """Makes the probability of `eos` nearly the same after every text; returns its std / mean over random texts.

    Dimension 0 of the residual stream becomes a constant (every token brings it, no layer writes to it), and the row of
    `eos` reads that dimension alone. How strongly is found by bisection on texts of random tokens.
    """
    table = m.model.embed_tokens.weight
    table[:, 0] = 0.1
    table[eos] = 0.0
    for layer in m.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    texts = torch.randint(1, eos, (64, 96), generator=torch.Generator().manual_seed(1))
    hidden = m.model(texts).last_hidden_state
    rest = (hidden @ table.T).index_fill(-1, torch.tensor([eos]), -math.inf).logsumexp(-1)

    def ends(strength: float) -> torch.Tensor:
        return torch.sigmoid(strength * hidden[..., 0] - rest)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ends(middle).mean() < probability else (low, middle)
    table[eos, 0] = low
    found = ends(low)
    assert abs(found.mean() / probability - 1) < 1e-3, found.mean()
    return float(found.std() / found.mean())


def write(size: str, tail: bool) -> None:
    eos = w.eos_id(size, tail)
    t = tokenizer(w.SIZES[size]["vocab"], eos)
    texts = w.prompts(1)
    assert [len(x) for x in t(texts)["input_ids"]] == [len(x) for x in texts]
    assert t.decode(t(texts[0])["input_ids"]) == texts[0]
    m = model(size, eos if tail else None)
    note = ""
    if tail:
        spread = end_with_probability(m, eos, 4 / TAIL_NEW)
        note = f"P(eos) = {4 / TAIL_NEW:.4f} a token, varying by {100 * spread:.0f} % between texts"
    folder = w.checkpoint(size, tail)
    m.save_pretrained(folder)
    t.save_pretrained(folder)
    print(size, f"{sum(x.numel() for x in m.parameters()) / 1e6:.2f}M parameters", folder, note)


if __name__ == "__main__":
    for name in sys.argv[1:] or w.SIZES:
        write(name, tail=False)
        if name in TAILED:
            write(name, tail=True)
