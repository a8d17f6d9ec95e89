"""One estimator with four parts is the gradient of them all (2509.04419).

`grad loss = -E_data[ stable * (1 / denominator) * A * grad pi ]`: a stabilisation mask, the policy that probabilities
are compared with, an advantage, and the gradient of the likelihood, which by a token's log-prob is `pi` itself;
`E_data` is the method's mean over tokens. The parts below are plain numpy, each what the method's paper says, and know
nothing of the library's surrogates.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load, names
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_rows
from jaxrl_llm.types import INJECTED


@dataclasses.dataclass(frozen=True)
class Data:
    """What the parts are functions of, `[B G T]`, 0 log-probs where masked; `reward` is `[B G]`."""

    mask: Any
    logp: Any
    old: Any  # of the sampler
    before: Any  # of the trainer, before the update
    reward: Any
    credit: Any  # what the recipe's advantage slot gave
    foreign: Any  # rows somebody else wrote

    @property
    def pi(self):
        return np.exp(self.logp)

    @property
    def ratio(self):
        return np.exp(self.logp - self.old)

    @property
    def lengths(self):
        return np.maximum(self.mask.sum(-1, keepdims=True), 1)

    @property
    def rows(self):
        return self.mask.any(-1)

    @property
    def own(self):
        return ~self.foreign[..., None]


# --- 1: the stabilisation mask, a function of data and advantage ------------------------------------------------------


def always(d, a):
    return np.ones(d.logp.shape)


def ppo_mask(d, a, *, low=0.2, high=0.2, ratio=lambda d: d.ratio):
    """0 where the update would push a token further out of the interval."""
    r = ratio(d)
    return np.where(((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low)), 0.0, 1.0)


def dual_mask(d, a, *, bound, **widths):
    return ppo_mask(d, a, **widths) * np.where((a < 0) & (d.ratio > bound), 0.0, 1.0)


def toward(d, a, *, width):
    """Only the side to which the advantage pushes (GMPO)."""
    change = d.logp - d.old
    return np.where(((a > 0) & (change > width)) | ((a < 0) & (change < -width)), 0.0, 1.0)


def soft_mask(d, a, *, positive, negative):
    """A mask between 0 and 1 (SAPO)."""
    tau = np.where(a > 0, positive, negative)
    gate = 1 / (1 + np.exp(-tau * (d.ratio - 1)))
    return 4 * gate * (1 - gate)


def by_source(d, a, *, own, foreign):
    return np.where(d.own, own(d, a), foreign(d, a))


def shaping(d, a, *, gamma):
    """`f'(pi)` of `f(u) = u / (u + gamma)` (LUFFY)."""
    return gamma / (d.pi + gamma) ** 2


# --- 2: the reference-policy denominator ------------------------------------------------------------------------------


def policy(d):
    return d.pi


def sampler(d):
    return np.exp(d.old)


def trainer(d):
    return np.exp(d.before)


def clipped_weight(d, *, low, high, ratio=lambda d: d.ratio):
    """`pi / clip(r)`: the old policy, as far as the weight is not clipped (CISPO)."""
    return d.pi / np.clip(ratio(d), 1 - low, 1 + high)


def sequence_ratio(d):
    mean = np.where(d.mask, d.logp - d.old, 0).sum(-1, keepdims=True) / d.lengths
    return np.broadcast_to(np.exp(mean), d.mask.shape)


def sequence(d):
    """`pi * (pi_old / pi)^(1 / L)` of whole rows (GSPO)."""
    return d.pi / sequence_ratio(d)


def geometric(d, *, width):
    """The same, each token's change bounded first (GMPO)."""
    a, change = d.credit, d.logp - d.old
    near = np.where(a > 0, np.minimum(change, width), np.maximum(change, -width))
    return d.pi / np.exp(np.where(d.mask, near, 0).sum(-1, keepdims=True) / d.lengths)


def prefix_ratio(d):
    out = np.ones(d.mask.shape)
    for place in np.ndindex(*d.mask.shape[:2]):
        for t in range(1, d.mask.shape[2]):
            out[place][t] = d.ratio[place][:t].min()
    return out * d.ratio


def mixture(d, *, gamma=0.5):
    """`(old + (old + 1) / 2) / 2`, and the share of the token that is not known yet (RL-PLUS)."""
    old = np.exp(d.before)
    return np.where(d.own, old, (old + (old + 1) / 2) / 2 / np.maximum(1 - d.pi, 1e-12) ** gamma)


def one_on_foreign(d):
    return np.where(d.own, np.exp(d.old), 1.0)


def mixed(d):
    """The sampler on own rows, the policy on those of somebody else: SFT."""
    return np.where(d.own, np.exp(d.old), d.pi)


# --- 3: the advantage -------------------------------------------------------------------------------------------------


def given(d):
    """What the recipe's slot found, for those with a critic."""
    return d.credit


def constant(d):
    return np.ones(d.mask.shape)


def z_score(r):
    return (r - r.mean()) / (r.std(ddof=1) + 1e-6)


def of_group(d, *, of=z_score, rows=lambda d: d.rows):
    out, use = np.zeros(d.mask.shape), rows(d)
    for b in range(len(out)):
        r = d.reward[b, use[b]]
        if len(r) > 1:
            out[b, use[b]] = of(r)[:, None]
    return out


def center(r):
    return r - r.mean()


def leave_one_out(r):
    return np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])


def shifted(r):
    return r - (r.mean() - 0.1)


def half(r):
    return center(r) / 2


def minus_batch_mean(d):
    return np.broadcast_to((d.reward - d.reward[d.rows].mean())[..., None], d.mask.shape)


def whitened(d, *, of):
    a = of(d)
    tokens = a[d.mask]
    return (a - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)


def rewards(d):
    return np.broadcast_to(d.reward[..., None], d.mask.shape)


def own_rows(d):
    return d.rows & ~d.foreign


def and_one(d, *, own):
    """The demonstration has advantage 1."""
    return np.where(d.own, own(d), 1.0)


# --- the data's mean --------------------------------------------------------------------------------------------------


def over_tokens(d, chosen=True):
    mask = d.mask & chosen
    return mask / max(mask.sum(), 1)


def over_rows(d, chosen=True):
    mask = d.mask & chosen
    return mask / np.maximum(mask.sum(-1, keepdims=True), 1) / max(mask.any(-1).sum(), 1)


def over_rows_and_budget(d, chosen=True):
    mask = d.mask & chosen
    return mask / (max(mask.any(-1).sum(), 1) * mask.shape[-1])


def sum_over_tokens(d):
    return d.mask / max(d.mask.any(-1).sum(), 1)


def over_groups(d):
    return d.mask / np.maximum(d.mask.sum((-2, -1), keepdims=True), 1) / max(d.mask.any((-2, -1)).sum(), 1)


def apart(d, *, own, foreign, weights=(1.0, 1.0), chosen=lambda d: d.rows):
    """A mean for each source, over its own rows of those chosen."""
    rows = chosen(d)[..., None]
    return weights[0] * own(d, rows & d.own) + weights[1] * foreign(d, rows & ~d.own)


def solved(d):
    """How many own rows of each prompt are right, and how many there are."""
    own = own_rows(d)
    return ((d.reward > 0.5) & own).sum(-1), own.sum(-1)


def above_gate(d, *, gate):
    right, rows = solved(d)
    explore = right / np.maximum(rows, 1) > gate
    return np.where(explore[:, None], ~d.foreign, d.foreign)


def if_rare(d, a, *, fewer_than):
    return np.broadcast_to((solved(d)[0] < fewer_than)[:, None, None], d.mask.shape) * 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A method as the four parts (the fourth, `grad pi`, is the same for all) and its mean over the data."""

    stable: Callable[..., Any] = always
    denominator: Callable[..., Any] = sampler
    advantage: Callable[..., Any] = of_group
    mean: Callable[..., Any] = over_tokens
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    foreign: bool = False  # on data with demonstrations in it


def own_and_one(of):
    return partial(and_one, own=partial(of_group, of=of, rows=own_rows))


CENTERED = partial(of_group, of=center)
TABLE = {
    # Likelihood: the denominator is the policy itself.
    "sft": Parts(denominator=policy, advantage=constant),
    "reinforce": Parts(denominator=policy, advantage=minus_batch_mean, mean=sum_over_tokens),
    "rloo": Parts(
        denominator=policy,
        advantage=partial(of_group, of=leave_one_out),
        mean=sum_over_tokens,
        arguments={"kl": None},
    ),
    "opmd": Parts(denominator=policy, advantage=partial(of_group, of=half)),
    "asymre": Parts(denominator=policy, advantage=partial(of_group, of=shifted)),
    "rec": Parts(stable=ppo_mask, denominator=policy, advantage=CENTERED),
    # The denominator is the policy that sampled.
    "ppo": Parts(stable=ppo_mask, advantage=given),
    "ppo_max": Parts(stable=ppo_mask, advantage=given),
    "salsa": Parts(stable=ppo_mask, advantage=given),
    "grpo": Parts(stable=ppo_mask, mean=over_rows, arguments={"kl": None}),
    "dr_grpo": Parts(stable=ppo_mask, advantage=CENTERED, mean=over_rows_and_budget),
    "dapo": Parts(stable=partial(ppo_mask, high=0.28), advantage=given),
    "reinforce_pp": Parts(stable=ppo_mask, advantage=partial(whitened, of=rewards), arguments={"kl": None}),
    "reinforce_pp_baseline": Parts(stable=ppo_mask, advantage=partial(whitened, of=CENTERED), arguments={"kl": None}),
    "mc_grpo": Parts(stable=ppo_mask, advantage=given, mean=over_rows, arguments={"kl": None}),
    "sapo": Parts(stable=partial(soft_mask, positive=1.0, negative=1.05), mean=over_rows),
    "spo_single_stream": Parts(stable=partial(dual_mask, bound=10.0, high=0.28), advantage=given),
    # It is made of both, so that the weight is bounded, a row's, or a prefix's.
    "cispo": Parts(
        denominator=partial(clipped_weight, low=0.1, high=0.2),
        mean=over_groups,
        arguments={"clip_low": 0.1, "clip_high": 0.2},
    ),
    "minpro": Parts(denominator=partial(clipped_weight, low=0.2, high=0.28, ratio=prefix_ratio)),
    "gspo": Parts(
        stable=partial(ppo_mask, low=0.05, high=0.06, ratio=sequence_ratio),
        denominator=sequence,
        mean=over_rows,
        arguments={"clip_low": 0.05, "clip_high": 0.06},
    ),
    "gspo_token": Parts(
        stable=partial(ppo_mask, low=0.05, high=0.06, ratio=sequence_ratio),
        denominator=sequence,
        mean=over_rows,
        arguments={"clip_low": 0.05, "clip_high": 0.06},
    ),
    "gmpo": Parts(
        stable=partial(toward, width=0.2),
        denominator=partial(geometric, width=0.2),
        mean=over_rows,
        arguments={"width": 0.2},
    ),
    # Own samples and demonstrations.
    "chord": Parts(
        stable=partial(by_source, own=ppo_mask, foreign=lambda d, a: d.pi * (1 - d.pi)),
        denominator=mixed,
        advantage=own_and_one(z_score),
        mean=partial(apart, own=over_rows, foreign=over_tokens, weights=(0.7, 0.3)),
        arguments={"peak": 0.3, "valley": 0.3},
        foreign=True,
    ),
    "hpt": Parts(
        denominator=mixed,
        advantage=own_and_one(center),
        mean=partial(apart, own=over_rows_and_budget, foreign=over_tokens, chosen=partial(above_gate, gate=0.5)),
        arguments={"gate": 0.5, "entropy": None},
        foreign=True,
    ),
    "ahpo": Parts(
        stable=partial(by_source, own=ppo_mask, foreign=partial(if_rare, fewer_than=2)),
        denominator=mixed,
        advantage=own_and_one(z_score),
        mean=partial(apart, own=over_tokens, foreign=over_rows),
        arguments={"fewer_than": 2.0},
        foreign=True,
    ),
    "rl_plus": Parts(
        denominator=mixture,
        advantage=CENTERED,
        mean=over_rows_and_budget,
        arguments={"entropy": None},
        foreign=True,
    ),
    "critique_grpo": Parts(
        stable=partial(by_source, own=always, foreign=partial(shaping, gamma=0.1)),
        denominator=one_on_foreign,
        advantage=CENTERED,
        mean=over_rows_and_budget,
        arguments={"entropy": None},
        foreign=True,
    ),
}
FOUND = [name for name in TABLE if name in names()]


def foreign_rows(batch):
    """The last row of each group is somebody else's, and right."""
    size = batch.outcome.shape[1]
    last = jnp.arange(size) == size - 1
    role = jnp.where(batch.rollouts.mask & last[:, None], INJECTED, batch.rollouts.role).astype(jnp.int8)
    logp = jnp.where(last[:, None], 0.0, batch.rollouts.logp)
    rollouts = dataclasses.replace(batch.rollouts, role=role, logp=logp)
    return dataclasses.replace(batch, rollouts=rollouts, outcome=jnp.where(last & batch.keep, 1.0, batch.outcome))


def data_of(batch, scores):
    """The batch as the recipe's slots left it, in numpy. Tokens a slot took out of the loss are out of the mask."""
    mask = np.asarray(batch.rollouts.mask & batch.keep[..., None])
    if batch.select is not None and not batch.rollouts.injected.any():
        mask = mask & np.asarray(batch.select)

    def real(x):
        return np.where(mask, np.asarray(x, np.float64), 0.0)

    return Data(
        mask=mask,
        logp=real(scores.logp),
        old=real(batch.rollouts.logp),
        before=real(batch.old.logp),
        reward=np.asarray(batch.outcome, np.float64),
        credit=real(batch.advantage),
        foreign=np.asarray(batch.rollouts.injected),
    )


def both(parts, name, scores, batch):
    """The gradient of the recipe's loss by every token's log-prob, the product of the parts, and the mask part."""
    algorithm = load(name, **parts.arguments)
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch).coefficient / batch.mask.sum()
    d = data_of(batch, scores)
    a = parts.advantage(d)
    stable = parts.stable(d, a)
    want = -parts.mean(d) * stable / parts.denominator(d) * a * d.pi
    return np.asarray(got), np.where(d.mask, want, 0.0), np.where(d.mask & (a != 0), stable, 1.0)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_the_product_of_the_four_parts(name, seed):
    parts = TABLE[name]
    scores, batch = random_batch(jax.random.key(seed), prompts=4, size=5)
    scores = dataclasses.replace(scores, logp=jnp.minimum(scores.logp, -0.01))  # no probability is above 1
    batch = foreign_rows(batch) if parts.foreign else batch
    got, want, stable = both(parts, name, scores, batch)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)
    assert (want != 0).any()
    if parts.stable is not always:
        assert (stable != 1).any()  # the mask does something on this batch


@pytest.mark.parametrize("name", [n for n in ("reinforce", "ppo", "grpo", "cispo", "gspo_token", "sft") if n in FOUND])
def test_the_same_on_two_rows_of_three_and_two_tokens(name):
    scores, batch = toy_rows(old=jnp.zeros((1, 2, 3)), value=jnp.zeros((1, 2, 3)), keep=jnp.ones((1, 2), bool))
    got, want, _ = both(TABLE[name], name, dataclasses.replace(scores, value=jnp.zeros((1, 2, 3))), batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert (want != 0).any()


def test_the_table_is_long():
    """Methods of every family are in it, or the identity says little."""
    assert len(FOUND) >= 12
