"""Random small models of every family in PyTorch (transformers) and here: the largest differences.

pip install -e '.[parity]' && python scripts/parity.py --seeds 4 --out docs/parity.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import hf
from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.transformer import transformer
from jaxrl_llm.models.weights import stored
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

LENGTHS = (9, 4, 1)  # of the contexts; R responses of each, at most T tokens
S, R, T = max(LENGTHS), 2, 9
ATTENDED = np.arange(T) < np.array([[9, 4], [2, 9], [9, 1]])[..., None]
NEW = 14  # tokens that are generated greedily
FULL, SLIDING = "full_attention", "sliding_attention"
COLUMNS = ("logits", "prefill + decode", "greedy", "gradient")


# --- transformers -----------------------------------------------------------------------------------------------------


def settings(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """An odd-shaped configuration of the family."""
    heads, kv = [(3, 1), (4, 2), (6, 3), (2, 2), (5, 5)][rng.integers(5)]
    layers, head_dim = int(rng.integers(2, 5)), int(rng.choice([4, 6, 10]))
    window = int(rng.integers(2, 8))
    types = [SLIDING, *rng.permutation([FULL, *rng.choice([FULL, SLIDING], layers - 2)]).tolist()]
    gemma = {"sliding_window": window, "layer_types": types, "query_pre_attn_scalar": int(rng.integers(3, 30))}
    own: dict[str, dict[str, Any]] = {
        "llama": {},
        "llama, llama3 rope": _rope(rng, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
        "llama, linear rope": _rope(rng, rope_type="linear"),
        "mistral": {"sliding_window": window},
        "qwen2": {},
        "qwen2, late windows": {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1},
        "qwen3": {},
        "qwen3_moe": {
            "num_experts": (n := int(rng.integers(3, 7))),
            "num_experts_per_tok": int(rng.integers(1, n)),
            "moe_intermediate_size": int(rng.integers(5, 17)),
            "norm_topk_prob": bool(rng.integers(2)),
        },
        "gemma2": {**gemma, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        "gemma3_text": {
            **gemma,
            "rope_parameters": {
                "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 3.0},
                "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
            },
        },
    }
    sizes = {
        "vocab_size": int(rng.integers(29, 61)),
        "hidden_size": heads * int(rng.choice([5, 7, 8])),
        "intermediate_size": int(rng.integers(11, 37)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "initializer_range": 0.3,  # far from the default .02, so that attention and gates leave their linear range
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rng.choice([50.0, 10_000.0]))},
        "tie_word_embeddings": bool(rng.integers(2)) or family.startswith("gemma"),
        # A padding token would take the gradient from its embedding.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family.startswith("qwen2"):  # its class knows no head_dim
        sizes["hidden_size"] = heads * sizes.pop("head_dim")
    return {**sizes, **own[family]}


FAMILIES = (
    *("llama", "llama, llama3 rope", "llama, linear rope", "mistral", "qwen2", "qwen2, late windows", "qwen3"),
    *("qwen3_moe", "gemma2", "gemma3_text"),
)


def _rope(rng: np.random.Generator, **more: Any) -> dict[str, Any]:
    rope = {"rope_theta": 100.0, "factor": float(rng.integers(2, 9)), **more}
    if more["rope_type"] == "llama3":
        rope["original_max_position_embeddings"] = 32
    return {"rope_parameters": rope}


def network(family: str, seed: int, **sizes: Any) -> Any:
    """A random PyTorch model; norms and biases are random too: ones and zeros would hide a missing one."""
    import torch
    import transformers

    kind = family.split(",", maxsplit=1)[0]
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    config, model = classes[kind]
    more = {**({"experts_implementation": "eager"} if kind == "qwen3_moe" else {}), **sizes}
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    torch.manual_seed(seed)
    made = model(config(**{**settings(family, rng), "attn_implementation": "eager", **more})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(-0.5, 0.5) if kind.startswith("gemma") else parameter.uniform_(0.5, 1.5)
            elif name.endswith((".bias", "mlp.gate.weight")) or ".experts." in name:
                parameter.normal_(std=0.5)
    return made


class Data(NamedTuple):
    """Texts, and how much each token counts in the loss."""

    contexts: np.ndarray  # [M S]
    responses: np.ndarray  # [M R T]
    weight: np.ndarray  # [M R T], 0 at padding


def data(vocab: int, seed: int) -> Data:
    rng = np.random.default_rng([seed, 1])
    contexts, responses = (rng.integers(0, vocab, x).astype(np.int32) for x in ((len(LENGTHS), S), (*ATTENDED.shape,)))
    return Data(contexts, responses, np.where(ATTENDED, rng.normal(size=ATTENDED.shape), 0.0).astype(np.float32))


def theirs(model: Any, texts: Data) -> dict[str, Any]:
    """Every row by itself, unpadded: logits `[M R T V]` (0 at padding), greedy tokens, gradients by name in files."""
    import torch

    contexts, responses, weight = (torch.as_tensor(x) for x in texts)
    contexts, responses = contexts.long(), responses.long()
    logits = np.zeros((*responses.shape, model.config.vocab_size), np.float32)
    greedy, loss = [], torch.zeros(())
    for m, length in enumerate(LENGTHS):
        context = contexts[m, :length]
        with torch.no_grad():
            made = model.generate(context[None], do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        greedy.append(made[0, length:].numpy())
        for r in range(R):
            n = int(ATTENDED[m, r].sum())
            row = responses[m, r, :n]
            out = model(torch.cat([context, row])[None]).logits[0, length - 1 : length - 1 + n]
            logits[m, r, :n] = out.detach().numpy()
            chosen = torch.log_softmax(out, -1).gather(-1, row[:, None])[:, 0]
            loss = loss + (chosen * weight[m, r, :n]).sum()
    loss.backward()
    return {"logits": logits, "greedy": np.stack(greedy), "gradient": dict(_gradients(model))}


def _gradients(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):  # fused in memory, apart in files
            parts = zip(("gate_proj", "up_proj"), np.split(gradient, 2, axis=1), strict=True)
        elif name.endswith("experts.down_proj"):
            parts = iter([("down_proj", gradient)])
        else:
            yield name, gradient
            continue
        for part, experts in parts:
            yield from ((f"{name.rsplit('.', 1)[0]}.{i}.{part}.weight", x) for i, x in enumerate(experts))


# --- this library -----------------------------------------------------------------------------------------------------


def ours(folder: Path, texts: Data, *, sampler: bool = True) -> dict[str, Any]:
    """The same from a folder: contexts padded and shared by their responses; also through the cache, token by token."""
    config, params = hf.load(folder)
    model = transformer(dataclasses.replace(config, remat=None))
    context = Context(tokens=jnp.asarray(texts.contexts), mask=jnp.arange(S) < np.array(LENGTHS)[:, None])
    params, tokens = jax.tree.map(jnp.asarray, params), jnp.asarray(texts.responses)

    def objective(params: Any) -> Any:
        prefix, offset, last = prefix_of(context)
        hidden = model.hidden(params, prefix, offset, inputs_of(last, tokens, ATTENDED), jnp.asarray(ATTENDED))
        logits = model.logits(params, hidden)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(ATTENDED, chosen, 0) * texts.weight), logits

    gradient, logits = jax.jit(jax.grad(objective, has_aux=True))(params)
    step = jax.jit(functools.partial(decoded, model))
    forced = jnp.pad(jnp.where(ATTENDED, tokens, 0), [(0, 0), (0, 0), (0, NEW - T)])
    cached, _ = step(params, context, forced)
    _, greedy = step(params, context, jnp.full((len(LENGTHS), R, NEW), -1))
    if sampler:
        keys = jax.random.split(jax.random.key(0), (len(LENGTHS), 1))
        draw = jax.jit(functools.partial(sample, model, length=NEW))
        context = jax.tree.map(lambda x: x[:, None], context)
        sampled = draw(params, keys, context, Sampling(temperature=0.0)).tokens[:, 0]
        np.testing.assert_array_equal(sampled, greedy[:, 0])
    there = ATTENDED[..., None]
    leaves = {p.path: functools.reduce(lambda x, k: x[k], p.path.split("/"), gradient) for p in stored(config)}
    return {
        "logits": np.where(there, logits, 0),
        "prefill + decode": np.where(there, cached[:, :, :T], 0),
        "greedy": np.asarray(greedy[:, 0]),
        "gradient": {
            name: np.asarray(leaves[p.path][place]).T if p.transposed else np.asarray(leaves[p.path][place])
            for p in stored(config)
            for place, name in p.names()
        },
    }


def decoded(model: Any, params: Any, context: Context, forced: Any) -> tuple[Any, Any]:
    """Logits `[M R N V]` and tokens `[M R N]`, token by token: those of `forced`, the most probable where it is -1."""
    prefix, offset, last = prefix_of(context)
    m, r, n = forced.shape
    decoder, kept = model.decoder(params), model.prefill(params, prefix)

    def step(carry: Any, t: Any) -> Any:
        cache, inputs = carry
        hidden, cache = model.decode(decoder, kept, prefix.mask, cache, offset, inputs, t)
        logits = model.logits(params, hidden)
        token = jnp.where(forced[..., t] < 0, jnp.argmax(logits, -1), forced[..., t]).astype(jnp.int32)
        return (cache, token), (logits, token)

    first = jnp.broadcast_to(last[:, None], (m, r)).astype(jnp.int32)
    _, (logits, tokens) = jax.lax.scan(step, (model.empty(m, r, n), first), jnp.arange(n))
    return jnp.moveaxis(logits, 0, 2), jnp.moveaxis(tokens, 0, 2)


# --- differences ------------------------------------------------------------------------------------------------------


def differences(mine: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest differences: of logits, as a share of the largest logit; of a tensor's gradient, of its largest entry.

    "greedy" is the share of tokens that differ.
    """
    scale = np.abs(reference["logits"]).max()
    found = {key: float(np.abs(mine[key] - reference["logits"]).max() / scale) for key in COLUMNS[:2]}
    found["greedy"] = float(np.mean(mine["greedy"] != reference["greedy"]))
    gradients = reference["gradient"]
    least = 1e-3 * max(np.abs(x).max() for x in gradients.values())  # below this a tensor has no scale of its own
    found["gradient"] = max(
        float(np.abs(mine["gradient"][name] - x).max() / max(np.abs(x).max(), least)) for name, x in gradients.items()
    )
    return found


def summary(gradient: dict[str, np.ndarray]) -> np.ndarray:
    """`[tensors 2]`, by name: each gradient's length, and its product with a fixed direction."""
    found = []
    for name in sorted(gradient):
        x = gradient[name].astype(np.float64).reshape(-1)
        found.append([np.linalg.norm(x), x @ np.cos(np.arange(x.size))])
    return np.array(found)


def compare(family: str, seed: int, **options: Any) -> dict[str, float]:
    """One random model, written by transformers, read and computed by this library."""
    made = network(family, seed)
    texts = data(made.config.vocab_size, seed)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return differences(ours(Path(folder), texts, **options), theirs(made, texts))


def table(seeds: int, sampler: bool, say: Callable[[str], Any]) -> list[str]:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for family in FAMILIES:
        found = [compare(family, seed, sampler=sampler and seed == 0) for seed in range(seeds)]
        worst = {key: max(x[key] for x in found) for key in COLUMNS}
        greedy = "identical" if worst["greedy"] == 0 else f"{worst['greedy']:.1%} differ"
        cells = [greedy if key == "greedy" else f"{worst[key]:.1e}" for key in COLUMNS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
        say(lines[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="random models of each family")
    parser.add_argument(
        "--no-sampler", action="store_true", help="greedy texts by argmax alone, not by the sampler too"
    )
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    import torch
    import transformers

    lines = table(args.seeds, not args.no_sampler, functools.partial(print, file=sys.stderr, flush=True))
    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}, JAX {jax.__version__}"
    text = "\n".join(
        [
            "# Agreement with transformers",
            "",
            f"`python scripts/parity.py --seeds {args.seeds}{' --no-sampler' * args.no_sampler}`",
            f"({versions}, CPU, float32):",
            f"{args.seeds} random model(s) of odd sizes for each family, written by transformers and read from the",
            "folder. Largest differences: of logits as a share of the largest logit, scored in a batch with shared,",
            "padded contexts and decoded through the cache; of the gradient of a weighted sum of log-probabilities,",
            f"as a share of the tensor's largest entry. Greedy texts are {NEW} tokens for each of {len(LENGTHS)}",
            "contexts. Windows are shorter than the texts.",
            "",
            *lines,
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
