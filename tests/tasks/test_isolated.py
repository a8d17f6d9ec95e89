"""Verifiers that misbehave, in processes of their own."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import metrics, tasks
from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.tasks.isolated import Isolated, address
from jaxrl_llm.types import Rollouts, Sampling
from jaxrl_llm.world import batch_of

VERIFIER = '''
import os, re, time
import numpy as np

def grade(prompts, completions, answer, scale=1.0, **columns):
    """What it does is what the response says."""
    print("verifiers may print")
    if len(completions) > 1 and "together" in completions:
        raise RuntimeError("not together")
    return [one(c, a, scale) for c, a in zip(completions, answer, strict=True)]

def one(c, a, scale):
    if c == "hang":
        while True:
            pass
    if c == "regex":  # holds the interpreter's lock
        re.match(r"(a+)+b", "a" * 64)
    if c == "exit":
        os._exit(3)
    if c == "abort":
        os.abort()
    if c == "raise":
        raise ValueError("no such answer")
    if c == "none":
        return None
    if c in ("text", "nan", "inf", "list", "big"):
        return {"text": "1.0", "nan": float("nan"), "inf": float("inf"), "list": [1.0], "big": 10**400}[c]
    return np.float32(scale * (c == a))

def short(prompts, completions, **columns):
    return [1.0]

def number(prompts, completions, **columns):
    return 1.0
'''


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "some_verifier.py").write_text(VERIFIER)
    sys.path.insert(0, str(folder))
    import some_verifier

    yield some_verifier
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def isolated(verifier):
    found = Isolated(functools.partial(verifier.grade, scale=2.0), 1.0)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def nothing_counted(request):
    if "isolated" in request.fixturenames:
        found = request.getfixturevalue("isolated")
        found.counts = dict.fromkeys(found.counts, 0)


def ask(isolated, *completions):
    return isolated(prompts=["?"] * len(completions), completions=list(completions), answer=["7"] * len(completions))


def test_scores_are_those_of_the_function(isolated, verifier):
    assert ask(isolated, "7", "8", "none") == [2.0, 0.0, None]
    assert ask(isolated) == []
    numpy = isolated(prompts=["?"], completions=["7"], answer=np.array(["7"]))
    assert numpy == [2.0] and not any(isolated.counts.values())


FAULTS = {
    "hang": "hung",
    "regex": "hung",
    "exit": "crashed",
    "abort": "crashed",
    "raise": "raised",
    "text": "nonsense",
    "inf": "nonsense",
    "list": "nonsense",
    "big": "nonsense",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_only_the_guilty_response_gets_none(isolated, fault):
    start = time.monotonic()
    assert ask(isolated, "7", fault, "8") == [2.0, None, 0.0]
    assert isolated.counts == dict.fromkeys(isolated.counts, 0) | {FAULTS[fault]: 1}
    assert FAULTS[fault] in isolated.last
    assert time.monotonic() - start < 20
    assert ask(isolated, "7") == [2.0]


def test_nan_is_a_verifiers_way_to_say_none(isolated):
    assert ask(isolated, "nan", "7") == [None, 2.0] and not any(isolated.counts.values())


def test_a_fault_of_all_together_is_none_of_each(isolated):
    assert ask(isolated, "7", "together") == [2.0, 0.0] and not any(isolated.counts.values())


def test_results_of_the_wrong_shape(verifier):
    for grade, right in ((verifier.short, [1.0, 1.0]), (verifier.number, [None, None])):
        one = Isolated(grade, 5.0)
        assert ask(one, "7", "8") == right
        assert one.counts["nonsense"] == right.count(None)
        one.close()


def test_a_worker_killed_from_outside_is_replaced(isolated):
    ask(isolated, "7")
    os.kill(isolated._process.pid, signal.SIGKILL)
    assert ask(isolated, "7", "8") == [2.0, 0.0] and not any(isolated.counts.values())


def test_what_another_process_cannot_find_is_refused(verifier, tmp_path):
    for grade in (lambda **_: [], functools.partial(verifier.grade, scale=object()), print.__call__):
        with pytest.raises(ValueError, match="verifier"):
            address(grade)
    with pytest.raises(ValueError, match="positive number of seconds"):
        Isolated(verifier.grade, 0)
    hidden = type(sys)("module_of_no_file")
    exec("def grade(prompts, completions): return []", vars(hidden))
    with pytest.raises(ImportError, match="module_of_no_file"):
        Isolated(hidden.grade, 1.0)


def test_rows_without_a_score_do_not_count(isolated, letters):
    """From the text to the batch: no outcome, not kept, and not a zero among the rewards."""
    task = dataclasses.replace(letters, grade=isolated, columns=lambda prompts: {"answer": ["a"]})
    ids = [task.tokenizer.convert_tokens_to_ids(list(text)) for text in ("a", "hang", "b")]
    tokens, mask, _ = tasks.pad_tokens(ids, 4, "right")
    prompts = task.test(1)
    outcome = tasks.host_verifier(task)(prompts, tokens[None], mask[None])
    np.testing.assert_array_equal(outcome, [[2.0, np.nan, 0.0]])
    assert isolated.counts["hung"] == 1

    blank = jnp.zeros((1, 3, 4))
    rollouts = Rollouts(
        prompts=prompts,
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=jnp.asarray(tokens[None]),
        mask=jnp.asarray(mask[None]),
        role=jnp.asarray(mask[None], jnp.int8),
        logp=blank,
        entropy=blank,
        version=blank.astype(jnp.int32),
        truncated=jnp.zeros((1, 3), bool),
        sampling=Sampling(),
    )
    for bad in (np.nan, np.inf, -np.inf):  # a verifier inside the step may say these
        batch, scored = batch_of(rollouts, jnp.asarray([[2.0, bad, 0.0]]), jnp.int32(0))
        assert scored.tolist() == batch.keep.tolist() == [[True, False, True]]
        found = metrics.of_batch(batch, scored)
        assert float(found["reward/mean"]) == 1.0 and float(found["unscored_rows"]) == pytest.approx(1 / 3)
        np.testing.assert_allclose(per_group(center, batch)[0, :, 0], [1.0, 0.0, -1.0])
