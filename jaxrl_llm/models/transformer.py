"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Qwen2, Qwen3, Llama)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxrl_llm.models.attention import causal, one_token, rotary, rotate, shared_prefix, write
from jaxrl_llm.models.model import Cache, Model
from jaxrl_llm.types import Context, PyTree

Attend = Callable[..., tuple[Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and switches, under the names of Hugging Face configurations where they have one.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_word_embeddings: bool = True
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    # None, "full", or the name of a policy in jax.checkpoint_policies. Keeping only what weights were multiplied into
    # halves the memory of a gradient and is faster than writing and reading back the rest.
    remat: str | None = "dots_with_no_batch_dims_saveable"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.remat not in (None, "full") and not hasattr(jax.checkpoint_policies, self.remat):
            raise ValueError(f"remat must be None, 'full' or a name in jax.checkpoint_policies, got {self.remat!r}")


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, computed in float32 (1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Block(nn.Module):
    """One layer, token by token; tokens meet only in `attend(q, k, v, seen) -> (out, kept)`."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], seen: PyTree) -> tuple[Array, Any]:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, param_dtype=jnp.float32, use_bias=False, dot_general=_rows)
        norm = functools.partial(RMSNorm, c.rms_norm_eps)

        h = norm(name="input_norm")(x)
        q = dense(c.num_attention_heads * c.head_dim, use_bias=c.qkv_bias, name="q_proj")(h)
        k = dense(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, name="k_proj")(h)
        v = dense(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, name="v_proj")(h)
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        out, kept = self.attend(rotate(q, *angles), rotate(k, *angles), v, seen)
        x = x + dense(c.hidden_size, name="o_proj")(out.reshape(*out.shape[:-2], -1))

        h = norm(name="mlp_norm")(x)
        gate = dense(c.intermediate_size, name="gate_proj")(h)
        up = dense(c.intermediate_size, name="up_proj")(h)
        return x + dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up), kept


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
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
        )(c, self.attend)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size), jnp.float32
            )

    def __call__(self, tokens: Array, positions: Array, seen: PyTree) -> tuple[Array, Any]:
        """`tokens`, `positions` `[M L]` -> the last block's output `[M L D]`, what `attend` kept of each layer."""
        x = self.embedding(tokens)
        angles = rotary(positions, self.config.head_dim, self.config.rope_theta)
        out: tuple[Array, Any] = self.layers(x, angles, seen)
        return out

    def embedding(self, tokens: Array) -> Array:
        return self.embed[tokens].astype(self.config.dtype)

    def final(self, x: Array) -> Array:
        return self.norm(x)

    def unembed(self, hidden: Array) -> Array:
        """`[... D] -> [... V]` float32."""
        c = self.config
        kernel = self.embed.T if c.tie_word_embeddings else self.lm_head
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
        return _rows(hidden.astype(c.dtype), kernel.astype(c.dtype), contract, preferred_element_type=jnp.float32)

    def everything(self, tokens: Array, positions: Array, seen: PyTree) -> Array:
        return self.unembed(self.final(self(tokens, positions, seen)[0]))


def transformer(config: TransformerConfig) -> Model:
    """The model as pure functions; parameters are a plain nested dict, every layer's stacked on a leading axis."""
    c = config
    bind = functools.partial(Transformer, c)

    def init(key: Array) -> PyTree:
        one = jnp.zeros((1, 1), jnp.int32)
        return bind(_attend_self).init(key, one, one, one == 0, method="everything")["params"]

    def inner(params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array, *, layer: int) -> Array:
        if not 0 <= layer < c.num_hidden_layers:
            raise ValueError(f"layer must be in [0, {c.num_hidden_layers - 1}] in this model, got {layer}")
        m, r, t = inputs.shape
        s = prefix.tokens.shape[-1]
        tokens = jnp.concatenate([prefix.tokens, inputs.reshape(m, r * t)], axis=1)
        positions = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.arange(s), (m, s)),
                jnp.broadcast_to(offset[:, None, None] + jnp.arange(t), (m, r, t)).reshape(m, r * t),
            ],
            axis=1,
        )
        # Input t carries token t - 1: it exists if that token does, and the context's last token always does.
        exists = jnp.concatenate([jnp.ones((m, r, 1), bool), attended[..., :-1]], axis=-1)
        own = jnp.tril(jnp.ones((t, t), bool)) & exists[:, :, None, :]
        few = dataclasses.replace(c, num_hidden_layers=layer + 1)
        model = Transformer(few, functools.partial(_attend_group, responses=r))
        if few != c:
            params = {**params, "layers": jax.tree.map(lambda x: x[: layer + 1], params["layers"])}
        x, _ = model.apply({"params": params}, tokens, positions, (prefix.mask, own))
        return jnp.asarray(x)[:, s:].reshape(m, r, t, -1)

    def hidden(params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array) -> Array:
        x = inner(params, prefix, offset, inputs, attended, layer=c.num_hidden_layers - 1)
        out: Any = bind(_attend_self).apply({"params": params}, x, method="final")
        return jnp.asarray(out)

    def logits(params: PyTree, hidden: Array) -> Array:
        out: Any = bind(_attend_self).apply({"params": params}, hidden, method="unembed")
        return jnp.asarray(out)

    def prefill(params: PyTree, prefix: Context) -> Cache:
        m, s = prefix.tokens.shape
        heads, dim = c.num_key_value_heads, c.head_dim
        if s == 0:
            nothing = jnp.zeros((m, heads, dim, 0), c.dtype), jnp.zeros((m, heads, 0, dim), c.dtype)
            return [nothing] * c.num_hidden_layers
        positions = jnp.broadcast_to(jnp.arange(s), (m, s))
        kept = bind(_attend_keep).apply({"params": params}, prefix.tokens, positions, prefix.mask)[1]
        return [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(c.num_hidden_layers)]

    def decoder(params: PyTree) -> PyTree:
        cast = {**params, "layers": jax.tree.map(lambda x: x.astype(c.dtype), params["layers"])}
        layers = [jax.tree.map(lambda x, i=i: x[i], cast["layers"]) for i in range(c.num_hidden_layers)]
        return {**cast, "layers": layers}

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
        whole = bind(_attend_self)
        x: Any = whole.apply(outer, inputs, method="embedding")
        position = offset[:, None] + jnp.broadcast_to(t, inputs.shape)
        angles = rotary(position, c.head_dim, c.rope_theta)
        block = Block(c, _attend_cache)
        new: list[Any] = []
        for i, layer in enumerate(params["layers"]):
            seen = (*prefix[i], mask, *cache[i], t, t if column is None else column)
            x, kept = block.apply({"params": layer}, x, angles, seen)
            new.append(kept)
        x = whole.apply(outer, x, method="final")
        return x, new

    return Model(
        vocab=c.vocab_size,
        width=c.hidden_size,
        init=init,
        hidden=hidden,
        inner=inner,
        logits=logits,
        prefill=prefill,
        decoder=decoder,
        empty=empty,
        decode=decode,
    )


def _rows(x: Array, kernel: Array, contract: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of `[... D]` and `[D E]` on one axis of rows.

    A kernel's gradient contracts all leading axes; over more than one of them XLA transposes what it reads first.
    """
    flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), contract[1]), **options)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def _attend_self(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, None]:
    return causal(q, k, v, seen), None


def _attend_keep(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, tuple[Array, Array]]:
    return causal(q, k, v, seen), (jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2))


def _attend_group(q: Array, k: Array, v: Array, seen: tuple[Array, Array], *, responses: int) -> tuple[Array, None]:
    """Prefix tokens attend to themselves, each response to the prefix and itself; `[M, S + R * T, ...]`."""
    prefix, own = seen
    m, s = prefix.shape
    (pq, rq), (pk, rk), (pv, rv) = ((x[:, :s], x[:, s:].reshape(m, responses, -1, *x.shape[2:])) for x in (q, k, v))
    out = shared_prefix(rq, (pk, pv, prefix), (rk, rv, own))
    return jnp.concatenate([causal(pq, pk, pv, prefix), out.reshape(m, -1, *q.shape[2:])], axis=1), None


def _attend_cache(q: Array, k: Array, v: Array, seen: Any) -> tuple[Array, tuple[Array, Array]]:
    """One new token per response, `[M R H d]`: writes its key and value and attends to the `t` before it and itself."""
    pk, pv, pmask, ck, cv, t, column = seen
    place, lead = jnp.arange(ck.shape[-1]), ck.shape[:-2]
    new_k, new_v = k.reshape(*lead, -1), v.reshape(*lead, -1)
    if column.ndim:
        here = jnp.broadcast_to((place == column[..., None])[:, :, None], (*k.shape[:-1], place.size))
        here = here.reshape(*lead, place.size)
        ck = jnp.where(here[..., None, :], new_k[..., None], ck)
        cv = jnp.where(here[..., None], new_v[..., None, :], cv)
    else:
        ck, cv = write(ck, new_k, column, -1), write(cv, new_v, column, -2)
    age = column[..., None] - place
    own = jnp.where(age < 0, age + place.size, age) <= t[..., None]  # a remainder, without a division per element
    return one_token(q, (pk, pv, pmask), (ck, cv, own)), (ck, cv)
