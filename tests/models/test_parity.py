"""Every family against transformers' PyTorch: what it computed once (tests/golden/hf); random models where it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "hf"

spec = importlib.util.spec_from_file_location("parity", ROOT / "scripts" / "parity.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir()))
def test_what_transformers_computed(family):
    expected = dict(np.load(GOLDEN / family / "expected.npz"))
    texts = parity.Data(*(expected[name] for name in parity.Data._fields))
    mine = parity.ours(GOLDEN / family, texts, sampler=False)
    scale = np.abs(expected["logits"]).max()
    for path in ("logits", "prefill + decode"):
        np.testing.assert_allclose(mine[path] / scale, expected["logits"] / scale, rtol=0, atol=1e-4, err_msg=path)
    np.testing.assert_array_equal(mine["greedy"], expected["greedy"])
    gradient = parity.summary(mine["gradient"])
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=1e-3, atol=1e-4 * expected["gradient"].max())


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", parity.FAMILIES)
def test_random_models(family, seed):
    pytest.importorskip("torch")
    found = parity.compare(family, seed, sampler=family in ("mistral", "gemma3_text"))
    assert found["logits"] < 1e-4
    assert found["prefill + decode"] < 1e-4
    assert found["greedy"] == 0
    assert found["gradient"] < 1e-3


def test_a_difference_is_seen():
    reference = {
        "logits": np.ones((1, 2)),
        "greedy": np.array([1, 2]),
        "gradient": {"a": np.array([1.0, 0.0]), "b": np.array([100.0])},
    }
    mine = {"logits": np.array([[1.0, 0.9]]), "prefill + decode": np.ones((1, 2)), "greedy": np.array([1, 3])}
    mine["gradient"] = {"a": np.array([1.0, 0.5]), "b": np.array([100.0])}
    found = parity.differences(mine, reference)
    assert found == pytest.approx({"logits": 0.1, "prefill + decode": 0.0, "greedy": 0.5, "gradient": 0.5})
