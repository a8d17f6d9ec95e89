"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.

Llama, Mistral, Qwen2, Qwen3, Qwen3 MoE, Gemma 2 and Gemma 3 are switches of `TransformerConfig`. They are read while a
program is made: what a model does not have is not in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxrl_llm.models.attend import attend_cache, attend_group, attend_keep, attend_packed, attend_self, own_inputs
from jaxrl_llm.models.attention import Rule, rotary, rotate
from jaxrl_llm.models.config import RopeScaling, TransformerConfig
from jaxrl_llm.models.experts import Experts, routed
from jaxrl_llm.models.model import Cache, Model, longer
from jaxrl_llm.models.packing import Packing
from jaxrl_llm.sharding import ROWS, parts, split
from jaxrl_llm.types import Context, PyTree

__all__ = ["Block", "RMSNorm", "RopeScaling", "Transformer", "TransformerConfig", "transformer"]

Attend = Callable[..., tuple[Array, Any]]
Wrap = Callable[[Any], Any]
Angles = tuple[Array, Array] | tuple[tuple[Array, Array], tuple[Array, Array]]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, or `* (1 + scale)` with `unit_offset`, computed in float32 (1910.07467)."""

    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros_init() if self.unit_offset else nn.initializers.ones_init()
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale.astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Block(nn.Module):
    """One layer, token by token; tokens meet only in `attend(q, k, v, seen, rule) -> (out, kept)`.

    `local` says whether this layer has the sliding window: a Python bool, an array where layers differ in one scan, or
    None where they are all alike. `tokens` is the mesh axis over which tokens are split where each is on its own, as in
    2205.05198: what a layer keeps for its gradient, and its norms, are then split as its weights are.
    """

    config: TransformerConfig
    attend: Attend
    tokens: str | None = None

    @nn.compact
    def __call__(self, x: Array, angles: Angles, seen: PyTree, local: bool | Array | None = None) -> tuple[Array, Any]:
        c = self.config
        angles, rule = _of_layer(c, angles, local)
        dense = functools.partial(nn.Dense, dtype=c.dtype, param_dtype=jnp.float32, use_bias=False, dot_general=_rows)
        norm = functools.partial(RMSNorm, c.rms_norm_eps, c.unit_offset_norm)

        x = split(x, ROWS, self.tokens)
        h = split(norm(name="input_norm")(x), ROWS)
        q = dense(c.num_attention_heads * c.head_dim, use_bias=c.qkv_bias, name="q_proj")(h)
        k = dense(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, name="k_proj")(h)
        v = dense(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, name="v_proj")(h)
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        out, kept = self.attend(rotate(q, *angles), rotate(k, *angles), v, seen, rule)
        out = dense(c.hidden_size, name="o_proj")(out.reshape(*out.shape[:-2], -1))
        out = split(out, ROWS, self.tokens)
        x = x + (norm(name="post_attention_norm")(out) if c.sandwich_norms else out)

        h, act = split(norm(name="mlp_norm")(x), ROWS), ACTIVATIONS[c.hidden_act]
        if c.num_experts:
            weights, chosen = routed(
                dense(c.num_experts, name="router")(h), c.num_experts_per_tok, norm=c.norm_topk_prob
            )
            sizes = c.num_experts, c.moe_intermediate_size
            out = Experts(*sizes, act, c.experts_implementation, c.dtype, name="experts")(h, weights, chosen)
        else:
            gate = dense(c.intermediate_size, name="gate_proj")(h)
            up = dense(c.intermediate_size, name="up_proj")(h)
            out = dense(c.hidden_size, name="down_proj")(act(gate) * up)
        out = split(out, ROWS, self.tokens)
        return x + (norm(name="post_mlp_norm")(out) if c.sandwich_norms else out), kept


class Transformer(nn.Module):
    """Embedding, scanned blocks, final norm, output projection."""

    config: TransformerConfig
    attend: Attend

    def setup(self) -> None:
        c = self.config
        self.embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        block: Any = Block
        if c.remat is not None:
            policy = None if c.remat == "full" else getattr(jax.checkpoint_policies, c.remat)
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.num_hidden_layers,
        )(c, self.attend, tokens="tensor" if c.split_tokens else None)
        self.norm = RMSNorm(c.rms_norm_eps, c.unit_offset_norm)
        if not c.tie_word_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size), jnp.float32
            )

    def __call__(self, tokens: Array, positions: Array, seen: PyTree) -> tuple[Array, Any]:
        """`tokens`, `positions` `[M L]` -> the last block's output `[M L D]`, what `attend` kept of each layer."""
        x, sliding = self.embedding(tokens), self.config.sliding
        local = jnp.array(sliding) if len(set(sliding)) > 1 else None
        out: tuple[Array, Any] = self.layers(x, _angles(self.config, positions), seen, local)
        return out

    def embedding(self, tokens: Array) -> Array:
        x = split(split(self.embed, "tensor")[tokens], ROWS).astype(self.config.dtype)
        # The factor is rounded to the type it is used in, as in training.
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scale_embeddings else x

    def final(self, x: Array) -> Array:
        return self.norm(x)

    def unembed(self, hidden: Array) -> Array:
        """`[... D] -> [... V]` float32."""
        c = self.config
        kernel = split(self.embed.T if c.tie_word_embeddings else self.lm_head, None, "tensor")
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
        logits = _rows(hidden.astype(c.dtype), kernel.astype(c.dtype), contract, preferred_element_type=jnp.float32)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def everything(self, tokens: Array, positions: Array, seen: PyTree) -> Array:
        return self.unembed(self.final(self(tokens, positions, seen)[0]))


def transformer(config: TransformerConfig, *, wrap: Wrap | None = None) -> Model:
    """The model as pure functions; parameters are a plain nested dict, every layer's stacked on a leading axis.

    Args:
      config: sizes and switches.
      wrap: changes each Flax module before it is used, as libraries for adapters and quantisation do; its layers are
        called `layers/NAME` in the whole network, and `NAME` in a block of the decoder.
    """
    c, wrapped = config, wrap or (lambda module: module)

    def bind(attend: Attend) -> Any:
        return wrapped(Transformer(c, attend))

    def init(key: Array) -> PyTree:
        one = jnp.zeros((1, 1), jnp.int32)
        return bind(attend_self).init(key, one, one, one == 0, method="everything")["params"]

    def inner(params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array, *, layer: int) -> Array:
        if not 0 <= layer < c.num_hidden_layers:
            raise ValueError(f"layer must be in [0, {c.num_hidden_layers - 1}] in this model, got {layer}")
        m, r, t = inputs.shape
        if c.split_tokens:
            prefix = longer(
                prefix, -(prefix.tokens.shape[-1] + r * t) % parts("tensor")
            )  # what does not divide is whole
        s = prefix.tokens.shape[-1]
        tokens = jnp.concatenate([prefix.tokens, inputs.reshape(m, r * t)], axis=1)
        positions = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.arange(s), (m, s)),
                jnp.broadcast_to(offset[:, None, None] + jnp.arange(t), (m, r, t)).reshape(m, r * t),
            ],
            axis=1,
        )
        few = c.first_layers(layer + 1)
        model = wrapped(Transformer(few, functools.partial(attend_group, responses=r)))
        if few != c:
            params = {**params, "layers": jax.tree.map(lambda x: x[: layer + 1], params["layers"])}
        x, _ = model.apply({"params": params}, tokens, positions, (prefix.mask, own_inputs(attended), offset))
        return jnp.asarray(x)[:, s:].reshape(m, r, t, -1)

    def hidden(params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array) -> Array:
        x = inner(params, prefix, offset, inputs, attended, layer=c.num_hidden_layers - 1)
        out: Any = bind(attend_self).apply({"params": params}, x, method="final")
        return jnp.asarray(out)

    def packed(
        params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array, *, packing: Packing
    ) -> Array:
        m, r, t = inputs.shape
        s, shards = prefix.tokens.shape[-1], packing.order.shape[0]
        places = (
            jnp.broadcast_to(jnp.arange(s), (m, s)),
            jnp.broadcast_to(offset[:, None, None] + jnp.arange(t), (m, r, t)),
        )
        tokens, positions = (
            jnp.concatenate([far.reshape(shards, -1), packing.pack(own)], axis=1)
            for far, own in zip((prefix.tokens, places[0]), (inputs, places[1]), strict=True)
        )
        seen = (prefix.mask, own_inputs(attended), offset, packing)
        x, _ = bind(attend_packed).apply({"params": params}, tokens, positions, seen)
        out: Any = bind(attend_self).apply({"params": params}, x[:, m * s // shards :], method="final")
        return jnp.asarray(out)

    def logits(params: PyTree, hidden: Array) -> Array:
        out: Any = bind(attend_self).apply({"params": params}, hidden, method="unembed")
        return jnp.asarray(out)

    def prefill(params: PyTree, prefix: Context) -> Cache:
        m, s = prefix.tokens.shape
        heads, dim = c.num_key_value_heads, c.head_dim
        if s == 0:
            nothing = jnp.zeros((m, heads, dim, 0), c.dtype), jnp.zeros((m, heads, 0, dim), c.dtype)
            return [nothing] * c.num_hidden_layers
        positions = jnp.broadcast_to(jnp.arange(s), (m, s))
        kept = bind(attend_keep).apply({"params": params}, prefix.tokens, positions, prefix.mask)[1]
        return [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(c.num_hidden_layers)]

    def decoder(params: PyTree) -> PyTree:
        cast = _cast(params["layers"], c.dtype)
        return {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], cast) for i in range(c.num_hidden_layers)]}

    def empty(m: int, r: int, t: int) -> Cache:
        heads, dim = c.num_key_value_heads, c.head_dim
        # No axis of size 1: around one, XLA repeats the update in a reshaped copy, and then copies the cache each step.
        lead = (m * r, heads) if heads > 1 else (m * r,)
        return [
            (jnp.zeros((*lead, dim, t), c.dtype), jnp.zeros((*lead, t, dim), c.dtype))
            for _ in range(c.num_hidden_layers)
        ]

    def decode(
        params: PyTree,
        prefix: Cache,
        mask: Array,
        cache: Cache,
        offset: Array,
        inputs: Array,
        t: Array,
        column: Array | None = None,
    ) -> tuple[Array, Cache]:
        outer = {"params": {k: v for k, v in params.items() if k != "layers"}}
        whole = bind(attend_self)
        x: Any = whole.apply(outer, inputs, method="embedding")
        position = offset[:, None] + jnp.broadcast_to(t, inputs.shape)
        angles = _angles(c, position)
        block = wrapped(Block(c, attend_cache))
        new: list[Any] = []
        for i, layer in enumerate(params["layers"]):
            seen = (*prefix[i], mask, *cache[i], offset, t, t if column is None else column)
            x, kept = block.apply({"params": layer}, x, angles, seen, c.sliding[i])
            new.append(kept)
        x = whole.apply(outer, x, method="final")
        return x, new

    model = Model(
        vocab=c.vocab_size,
        width=c.hidden_size,
        init=init,
        hidden=hidden,
        inner=inner,
        packed=packed,
        logits=logits,
        prefill=prefill,
        decoder=decoder,
        empty=empty,
        decode=decode,
        dtype=c.dtype,
        wrapped=functools.partial(transformer, config) if wrap is None else None,
    )
    if not c.scan_decode:
        return model
    from jaxrl_llm.models.scanned import scanned  # it is made of this file's parts

    return scanned(c, model, wrapped)


def _cast(params: PyTree, dtype: Any) -> PyTree:
    """Weights in `dtype`; the codes of quantised ones stay what they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def _rows(x: Array, kernel: Array, contract: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of `[... D]` and `[D E]` on one axis of rows.

    A kernel's gradient contracts all leading axes; over more than one of them XLA transposes what it reads first.
    """
    flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), contract[1]), **options)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def _angles(c: TransformerConfig, positions: Array) -> Angles:
    """Cosines and sines; of full layers and of sliding ones, if these turn at another pace."""
    full = rotary(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    return full if c.rope_local_base_freq is None else (full, rotary(positions, c.head_dim, c.rope_local_base_freq))


def _of_layer(c: TransformerConfig, angles: Any, local: bool | Array | None) -> tuple[tuple[Array, Array], Rule]:
    """What this layer turns by, and what it sees."""
    local = c.sliding[0] if local is None else local
    scale = (c.head_dim if c.query_pre_attn_scalar is None else c.query_pre_attn_scalar) ** -0.5
    rule = Rule(scale=scale, cap=c.attn_logit_softcapping, window=c.sliding_window, splash=c.attention == "splash")
    full, near = (angles, angles) if c.rope_local_base_freq is None else angles
    if not isinstance(local, bool):
        turned = full if near is full else jax.tree.map(functools.partial(jnp.where, local), near, full)
        return turned, rule._replace(local=local)
    return (near, rule) if local else (full, rule._replace(window=None))
