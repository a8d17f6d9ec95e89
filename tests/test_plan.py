"""One step compiled for eight virtual CPU devices, and its figures counted again by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest

from jaxrl_llm import cli
from jaxrl_llm.chips import CHIPS, topology
from jaxrl_llm.footprint import Exchange, Memory, Phase, exchanges, refused
from jaxrl_llm.hlo import Collective
from jaxrl_llm.models import sizes
from jaxrl_llm.plan import Plan, PlanConfig, plan
from jaxrl_llm.plan_text import advice, seconds, text
from jaxrl_llm.rollouts.distribution import BLOCK

D, F, L, H, K, HEAD, V = 64, 128, 3, 4, 2, 16, 512
B, G, S, T = 8, 4, 16, 64
FILE = {
    "model_type": "qwen2",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(FILE))
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    """What `jaxrl-llm plan --json` printed, the text it read it from, and the plan itself."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_print", lambda out: found.update(json=json.loads(out)))
        patch.setattr("jaxrl_llm.plan.plan", lambda config: found.setdefault("plan", plan(config)))
        cli.main(
            f"plan --model {folder} --topology cpu:8 --mesh data=2,fsdp=2,tensor=2 --prompts-per-step {B} "
            f"--group-size {G} --prompt-length {S} --response-length {T} --set kl=none --json "
            f"--hlo {folder / 'step.txt'}".split()
        )
    return found["json"], (folder / "step.txt").read_text(), found["plan"]


LAYER = D * HEAD * (2 * H + 2 * K) + 3 * D * F  # weights that are multiplied by


def test_memory_is_that_of_the_shards(printed):
    found, _, _ = printed
    biases = HEAD * (H + 2 * K)
    # Matrices are split over fsdp and tensor, biases over tensor, norms are whole.
    split = (V * D + L * LAYER) / 4 + L * biases / 2 + (2 * L + 1) * D
    assert found["memory"]["parameters"] == 4 * split
    assert found["parameters"] == V * D + L * (LAYER + biases) + (2 * L + 1) * D
    moments = found["memory"]["optimizer"] - 2 * 4 * split
    assert 0 < moments < 100  # counts and hyperparameters
    m = found["memory"]
    assert m["total"] >= m["parameters"] + m["optimizer"] + m["temporary"]
    # Keys and values of the last cache, 32 rows over 4, the heads over 2.
    assert m["cache"] >= 2 * 2 * (B * G / 4) * (K / 2) * HEAD * T * L
    assert found["fits"] and m["limit"] is None


def test_what_is_certain_needs_no_compiler(printed, folder):
    _, _, whole = printed
    config = dataclasses.replace(whole.config, compile=False, hlo=None)
    sure = plan(config)
    assert sure.memory.parameters == whole.memory.parameters and sure.parameters == whole.parameters
    assert sure.memory.optimizer == whole.memory.optimizer
    rows, prompts, heads = B * G / 4, B / 4, K / 2
    assert sure.memory.cache == 2 * 2 * rows * heads * HEAD * T * L
    biases, norms = HEAD * (H + 2 * K), 2 * D
    weights = 2 * L * (LAYER / 2 + biases / 2 + norms) + 4 * (V * D / 2 + D)  # what is outside of layers is float32
    assert sure.memory.reads == weights + 2 * 2 * prompts * heads * HEAD * (S - 1) * L
    assert sure.memory.total < whole.memory.total
    assert "at least" in text(sure) and "not compiled" in text(sure) and not sure.phases
    with_slots = plan(dataclasses.replace(config, slots=8))
    assert with_slots.memory.cache == sure.memory.cache / 4


def test_flops_are_those_of_the_step(printed):
    found, _, _ = printed
    rows, prompts, tensor = B * G / 4, B / 4, 2
    token = 2 * (L * LAYER + V * D)
    attended = sum(steps * (S - 1 + cache) for steps, cache in ((32, 32), (32, 64)))
    generation = rows * (T * token + 4 * L * H * HEAD * attended)
    generation += prompts * (S - 1) * (2 * L * LAYER + 4 * L * H * HEAD * (S - 1))
    drawing = rows * T * 2 * BLOCK**2  # sums within the block a token is drawn from, on every chip along tensor
    assert found["phases"]["generation"]["flops"] == pytest.approx(generation / tensor + drawing, rel=0.01)
    # A gradient: twice the forward pass, and what it computes again.
    forward, backward = (found["phases"][name]["flops"] for name in ("forward", "backward"))
    tokens = prompts * (S - 1) + rows * T
    assert forward >= (tokens * 2 * L * LAYER + rows * T * 2 * V * D) / tensor
    assert 1.9 * forward < backward < 3.1 * forward
    whole = B * (6 * (S + G * T) + 2 * (S + G * T)) * found["parameters"]
    assert found["model_flops"] == whole


def test_chips_exchange_what_the_table_splits(printed):
    found, _, _ = printed
    kinds = {one["kind"] for one in found["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds
    counts = {one["times"] for one in found["collectives"]}
    assert max(counts) >= T * L  # a sum over tensor for each token and layer: loops are counted
    assert all(one["devices"] in (2, 4, 8) for one in found["collectives"])


def test_the_text_says_it_all(printed):
    _, program, found = printed
    shown = text(found)
    for word in ("generation", "all-gather", "optimiser", "data=2,fsdp=2,tensor=2", "64 tokens"):
        assert word in shown
    assert "ENTRY" in program
    assert seconds(found) is None  # of a CPU nothing is known


# --- tables and words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sizes.MODELS)
def test_published_models_have_their_published_parameters(name):
    c = sizes.config(name)
    heads, keys = c.num_attention_heads, c.num_key_value_heads
    layer = c.hidden_size * (c.head_dim * (2 * heads + 2 * keys) + 3 * c.intermediate_size + 2)
    layer += c.qkv_bias * c.head_dim * (heads + 2 * keys) + c.qk_norm * 2 * c.head_dim
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    assert c.num_hidden_layers * layer + tables + c.hidden_size == pytest.approx(sizes.MODELS[name][2], rel=6e-4)


def test_topologies():
    v5p = topology("v5p:2x2x4")
    assert (v5p.devices, v5p.sold_as) == (16, "v5p-32")
    assert (topology("v5e:4x4").sold_as, topology("v6e:8x8").devices) == ("v5e-16", 64)
    assert topology("cpu:8").chip is None
    for wrong in ("v5e", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "cpu:0", "v5e:0x4", "cpu:x"):
        with pytest.raises(ValueError, match="--topology"):
            topology(wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nobody"}, "'nobody' is neither .* qwen2.5-7b"),
        ({"model": "no/such/folder"}, "config.json: no such file"),
        ({"mesh": "data=3"}, "needs 3 devices, got 8"),
        ({"accumulate": 3}, "--accumulate 3 must divide"),
        ({"group_size": 0}, "--group-size must be at least 1"),
        ({"split_tokens": True, "mesh": "fsdp=8"}, "--split-tokens splits them over tensor"),
        ({"mean_response": 2.0}, "--mean-response"),
        ({"set": {"clip_hgih": 1}}, "no 'clip_hgih'"),
        ({"topology": "cpu:16"}, "has 8 CPU devices"),
    ],
)
def test_what_is_wrong_is_said(folder, changes, words):
    given = {"model": str(folder), "topology": "cpu:8", "prompts_per_step": 8}
    with pytest.raises((ValueError, OSError), match=words):
        plan(PlanConfig(**(given | changes)))


def test_a_file_that_is_no_configuration_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--model", str(tmp_path / "other.json"), "--topology", "cpu:8"])
    assert stopped.value.code == 2
    assert "other.json: not valid JSON" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_a_tpu_is_refused(folder):
    with pytest.raises(ImportError, match=r"pip install 'jaxrl_llm\[tpu\]'"):
        plan(PlanConfig(model=str(folder), topology="v5e:2x2"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_a_step_compiles_for_a_tpu(folder):
    found = plan(
        PlanConfig(model=str(folder), topology="v5e:2x2", prompts_per_step=4, group_size=2, response_length=16)
    )
    assert found.memory.fits and found.phases["generation"].estimate > 0 and seconds(found)["links"] > 0


def test_a_refusal_of_the_compiler_is_read():
    state = Memory(2**30, 2**31, 0, 0, 0, 0, 0, 3 * 2**30, 15.75 * 2**30)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded ..."
    found = refused(state, message)
    assert (found.total, found.limit, found.temporary) == (24.5 * 2**30, 15.75 * 2**30, 21.5 * 2**30)
    assert not found.fits
    with pytest.raises(RuntimeError, match="Mosaic failed"):
        refused(state, "INTERNAL: Mosaic failed")


def made(**changes):
    config = PlanConfig(model="qwen2.5-7b", topology="v5e:4x4", mesh="data=2,fsdp=4,tensor=2", accumulate=2)
    memory = Memory(4 * 2**30, 8 * 2**30, 0, 10 * 2**30, 2**30, 2**30, 2**30, 23 * 2**30, 15.75 * 2**30)
    empty = Plan(
        config=config,
        topology=topology(config.topology),
        mesh={"data": 2, "fsdp": 4, "tensor": 2},
        model=sizes.config("qwen2.5-7b"),
        group_size=8,
        parameters=7_615_616_512,
        memory=memory,
    )
    return dataclasses.replace(empty, **changes)


def test_what_does_not_fit_is_told_what_to_change():
    said = "\n".join(advice(made()))
    for word in (
        "data=1,fsdp=8,tensor=2",
        "fsdp=2,tensor=4",
        "--attention splash",
        "--accumulate 4",
        "--remat full",
        "--slots 256",
        "--response-length 512",
    ):
        assert word in said
    assert "7.25 GiB too much of 15.75 GiB" in said
    at_the_end = made(
        config=dataclasses.replace(made().config, remat="full", accumulate=64), mesh={"data": 1, "fsdp": 8, "tensor": 2}
    )
    said = "\n".join(advice(at_the_end))
    for word in ("split the state", "--accumulate", "--remat"):
        assert word not in said


def test_time_follows_the_chip():
    chip = CHIPS["v5e"]
    phase = Phase(chip.flops, 0.0, 1.0, 2.0)
    found = made(
        memory=made().memory._replace(total=2**30),
        phases={"generation": phase, "forward": phase},
        exchanges=[Exchange("all-reduce", 2**20, 4, 100, 3.0)],
        model_flops=16 * chip.flops,
    )
    assert seconds(found) == {"roofline": 2.0, "estimate": 4.0, "links": 3.0}
    shown = text(found)
    assert "between 3 s" in shown and "7 s (nothing hidden): 14 to 33 % of the peak" in shown
    assert "Links take longer than computing" in shown


def test_links_are_rings_where_the_torus_is_closed():
    def one(where, kind="all-gather", size=9e9, devices=16):
        (found,) = exchanges([Collective(kind, int(size), 2, devices, (), "")], topology(where))
        return found.seconds

    assert one("v5e:4x4") == pytest.approx(2 * 9e9 * 15 / 16 / 45e9)
    assert one("v5e:16x16") == pytest.approx(2 * 9e9 * 15 / 16 / 90e9)
    assert one("v5e:4x4", "all-reduce") == pytest.approx(2 * one("v5e:4x4"))
    assert one("v5e:4x4", size=8) == pytest.approx(2 * 15 * 1e-6)  # a hop's latency each
    assert one("cpu:16") is None
