"""What a command line asks for reaches what it names."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxrl_llm import job
from jaxrl_llm.job import TrainConfig, learner_of, prepare


def test_how_it_computes_is_an_option(tmp_path, monkeypatch):
    given = {}

    def language_model(model, **options):
        given.update(options, dtype=model.dtype)
        return real(model, **options)

    real = job.language_model
    monkeypatch.setattr(job, "language_model", language_model)
    asked = TrainConfig(task="sorting", run=tmp_path / "r", dtype="bfloat16", remat="none", slots=4, pack=3)
    prepared = prepare(asked)
    learner_of(prepared)
    assert given == {"slots": 4, "sizes": 3, "dtype": jnp.bfloat16}
    assert prepared.model.remat is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remat": "dots"}, "remat must be None, 'full'"),
        ({"split_tokens": True}, "--split-tokens splits them over tensor: --mesh tensor=N"),
        ({"pack": 0}, "--pack must be"),
        ({"slots": 0}, "--slots must"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(TrainConfig(task="sorting", run=tmp_path / "r", **options))
