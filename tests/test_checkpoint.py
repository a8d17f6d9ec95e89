"""Series of checkpoints: kept, found whole or not at all, on any mesh."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm import checkpoint
from jaxrl_llm.checkpoint import CheckpointError, Checkpoints, SaveError
from jaxrl_llm.types import Sampling, TrainState


def state(i, params=None):
    made = {"w": jax.random.normal(jax.random.key(i), (64, 32)), "b": jnp.arange(8, dtype=jnp.bfloat16) * i}
    return TrainState(
        step=jnp.int32(i),
        key=jax.random.key(i),
        params={"policy": made if params is None else params},
        opt_state={"policy": (jnp.float32(i), ())},
        memory={"rollout": {"none": jnp.zeros((0, 3)), "held": jnp.array([True, False])}},
        numbers={"clip": jnp.float32(0.2)},
        sampling=Sampling(temperature=jnp.float32(1)),
    )


LIKE = jax.eval_shape(lambda: state(0))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Steps 1 to 5; 2 has the highest score."""
    folder = tmp_path_factory.mktemp("series")
    with Checkpoints(folder, keep=2, best=1) as made:
        for step, score in ((1, 0.4), (2, 0.9), (3, 0.3), (4, None), (5, 0.2)):
            made.save(step, state(step), {"cursor": 10 * step}, score)
    return folder


@pytest.fixture
def copy(series, tmp_path):
    shutil.copytree(series, tmp_path / "copy")
    return tmp_path / "copy"


def test_newest_and_best_are_kept_and_come_back_whole(series):
    made = Checkpoints(series)
    assert made.steps() == [2, 4, 5]
    saved = made.restore(LIKE)
    assert (saved.step, saved.run) == (5, {"cursor": 50})
    same(saved.state, state(5))
    same(checkpoint.load(series / "2", LIKE), state(2))
    assert made.restore(LIKE, before=5).step == 4 and made.restore(LIKE, before=2) is None
    assert Checkpoints(series / "nowhere").restore(LIKE) is None


HARM = {"flipped": lambda x: x[: len(x) // 2] + bytes([x[len(x) // 2] ^ 16]) + x[len(x) // 2 + 1 :]}
HARM |= {"cut": lambda x: x[: len(x) // 2], "emptied": lambda x: b"", "gone": None}


@pytest.mark.parametrize("how", HARM)
def test_any_damaged_file_of_the_newest_falls_back_to_the_one_before(copy, how):
    """Of array data a flipped bit is a wrong number to every reader but one who has digests."""
    files = [path for path in sorted((copy / "5").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 8
    for path in files:
        good = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(HARM[how](good))
        said = []
        saved = Checkpoints(copy, say=said.append).restore(LIKE)
        if path.name == checkpoint.DIGESTS and how == "gone":  # as if the process had ended before they were written
            assert saved.step == 5 and not said
        else:
            assert saved.step == 4 and "checkpoint 5 is damaged" in said[0], path
        path.write_bytes(good)
    with pytest.raises(ValueError, match="damaged"):
        (copy / "5" / "_CHECKPOINT_METADATA").write_bytes(b"{}")
        checkpoint.load(copy / "5", LIKE)


def test_all_damaged_or_of_another_run_is_an_error(copy):
    other = jax.eval_shape(lambda: state(0, {"other": jnp.zeros(3)}))
    with pytest.raises(CheckpointError, match="is not of this configuration"):
        Checkpoints(copy).restore(other)
    for path in copy.glob("*/state/_METADATA"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged.*_METADATA is missing"):
        Checkpoints(copy).restore(LIKE)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(copy / "6", LIKE)


def test_half_a_checkpoint_is_never_picked_and_is_cleared_away(copy):
    half = copy / "6.orbax-checkpoint-tmp-1"
    shutil.copytree(copy / "5", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(copy) as made:
        assert made.steps() == [2, 4, 5] and made.restore(LIKE).step == 5
        made.save(7, state(7), {})
    assert not half.exists() and made.steps() == [2, 5, 7]


def test_forgetting_goes_back(copy):
    with Checkpoints(copy) as made:
        made.restore(LIKE, before=5)
        made.forget(after=4)
        assert made.steps() == [2, 4]
        made.save(5, state(50), {})
        made.wait()
        same(made.restore(LIKE).state, state(50))


def test_saving_does_not_wait_and_the_state_may_be_donated(tmp_path):
    big = state(1, {"w": jnp.arange(500_000.0)})
    expected = np.array(big.params["policy"]["w"])
    step = jax.jit(
        lambda x: jax.tree.map(lambda y: y if y.dtype == jax.random.key(0).dtype else y * 0, x), donate_argnums=0
    )
    with Checkpoints(tmp_path) as made:
        made.save(1, big, {})
        made.check()
        for _ in range(5):
            big = step(big)
        jax.block_until_ready(big)
        made.wait()
        found = made.restore(jax.eval_shape(lambda: big)).state
    np.testing.assert_array_equal(found.params["policy"]["w"], expected)
    assert int(found.step) == 1


def test_no_room_is_said_and_leaves_those_before_as_they_were(copy, no_room):
    with Checkpoints(copy) as made:
        with no_room(), pytest.raises(SaveError, match=r"checkpoint 6 could not be written to .*large"):
            made.save(6, state(6), {})
            made.wait()
        assert made.steps() == [2, 4, 5] and made.restore(LIKE).step == 5
        assert not [path for path in copy.iterdir() if path.name.startswith("6")]
        made.save(6, state(6), {})
    same(made.restore(LIKE).state, state(6))


def test_a_failed_save_is_heard_of_at_the_next_occasion(copy, no_room):
    with pytest.raises(SaveError), no_room(), Checkpoints(copy) as made:
        made.save(6, state(6), {})


def test_shards_are_written_and_read_on_any_mesh(tmp_path):
    def on(shape, spec):
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        return {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P(None))}

    value = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.arange(3.0)}
    places = [on((8, 1), P("a")), on((2, 4), P("a", "b")), on((4, 2), P("b", "a")), on((1, 8), P())]
    checkpoint.save(tmp_path / "one", state(3, jax.device_put(value, places[0])))
    for place in places:
        params = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place[k]) for k, x in value.items()}
        found = checkpoint.load(tmp_path / "one", state(0, params))
        same(found, state(3, value))
        assert all(found.params["policy"][k].sharding == place[k] for k in value)
