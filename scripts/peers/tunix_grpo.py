"""Tunix's GRPOLearner (its own sampler, rollout engine "vanilla") on the workloads of workload.py.

    bash setup.sh DIR                                            # once: its environment and the checkpoints
    BENCH_CKPT=DIR/ckpt DIR/tunix/bin/python tunix_grpo.py --size tiny --beta 0 --steps 12

Prints a line a step and `RESULT {json}` at the end; the seconds of a step are split into gen, ref, score and update.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

clock = time.perf_counter
STARTED = clock()


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="tiny", choices=("tiny", "small", "research"))
    p.add_argument("--beta", type=float, default=0.0, help="weight of the KL term")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--skip", type=int, default=2, help="first steps left out of the summary")
    p.add_argument("--tail", action="store_true", help="W3: long-tailed lengths")
    p.add_argument("--micro", type=int, default=64, help="rollouts per micro-batch of the update")
    p.add_argument("--remat", default="none", choices=("none", "block", "decoder"))
    return p.parse_args()


def main() -> None:
    a = arguments()
    if a.tail:
        os.environ["BENCH_TAIL"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import workload as w
    from flax import nnx
    from transformers import PreTrainedTokenizerFast
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_params
    from tunix.rl import rl_cluster as rl
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    imported = clock() - STARTED
    compiled = dict(trace=0.0, lower=0.0, backend=0.0, programs=0)

    def on_duration(name: str, seconds: float, **_: Any) -> None:
        for end, part in (
            ("jaxpr_trace_duration", "trace"),
            ("jaxpr_to_mlir_module_duration", "lower"),
            ("backend_compile_duration", "backend"),
        ):
            if name.endswith(end):
                compiled[part] += seconds
        compiled["programs"] += name.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(on_duration)

    folder, c = w.checkpoint(a.size), w.SIZES[a.size]
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model_config = qwen2.ModelConfig(
        num_layers=c["layers"],
        vocab_size=c["vocab"],
        embed_dim=c["hidden"],
        hidden_dim=c["inter"],
        num_heads=c["heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["kv_heads"],
        rope_theta=w.ROPE_THETA,
        norm_eps=w.NORM_EPS,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat_config=getattr(qwen2.RematConfig, a.remat.upper()),
    )

    def load() -> Any:
        return qwen2_params.create_model_from_safe_tensors(folder, model_config, mesh, dtype=jnp.float32)

    micro = a.micro // w.GROUP
    cluster = rl.RLCluster(
        actor=load(),
        reference=load() if a.beta else None,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        cluster_config=rl.ClusterConfig(
            role_to_mesh={r: mesh for r in (rl.Role.ACTOR, rl.Role.REFERENCE, rl.Role.ROLLOUT)},
            rollout_engine="vanilla",
            training_config=rl.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(w.CLIP), optax.adamw(w.LR, *w.BETAS, eps=w.EPS, weight_decay=w.WD)
                ),
                eval_every_n_steps=10**9,
                max_steps=a.steps,
                mini_batch_size=w.PROMPTS,
                train_micro_batch_size=micro,
                # All rollouts of a step are sampled in one call, as TRL does.
                rollout_micro_batch_size=w.PROMPTS,
                compute_logps_micro_batch_size=w.PROMPTS,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=w.NEW,
                max_prompt_length=w.PLEN,
                kv_cache_size=w.SEQ,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[w.eos_id(a.size)],
            ),
        ),
    )
    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=w.reward,
        algo_config=GRPOConfig(num_generations=w.GROUP, num_iterations=1, beta=a.beta, epsilon=0.2),
    )

    steps: list[dict[str, float]] = []
    now: dict[str, Any] = {}

    def reset() -> None:
        now.update(gen=0.0, ref=0.0, prepared=0.0, lengths=[], updates=0, since=clock())

    def timed(owner: Any, method: str, part: str, after: Callable[[Any], None] | None = None) -> None:
        """A stop-watch around a method; no behaviour changes."""
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            t = clock()
            result = call(*args, **kwargs)
            if part != "gen":  # what generate returns is on the host already
                jax.block_until_ready(jax.tree.leaves(result))
            now[part] += clock() - t
            if after:
                after(result)
            return result

        setattr(owner, method, watched)

    def generated(result: Any) -> None:
        assert result.left_padded_prompt_tokens.shape[1] == w.PLEN, result.left_padded_prompt_tokens.shape
        # Tunix cuts the EOS off; it was generated all the same.
        now["lengths"] += [min(len(t) + 1, w.NEW) for t in result.tokens]

    timed(cluster, "generate", "gen", generated)
    timed(cluster, "get_ref_per_token_logps", "ref")
    timed(learner, "_generate_and_compute_advantage", "prepared")
    update_actor = cluster.update_actor

    def update(*args: Any, **kwargs: Any) -> None:
        update_actor(*args, **kwargs)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        now["updates"] += 1
        if now["updates"] < w.ROWS // a.micro:
            return
        step = clock() - now["since"]
        w.check_lengths(now["lengths"])
        score = now["prepared"] - now["gen"] - now["ref"]
        row = dict(step=step, gen=now["gen"], ref=now["ref"], score=score, update=step - now["prepared"])
        steps.append(row | dict(new_tokens=sum(now["lengths"]), oth=w.others()))
        print({k: round(v, 3) for k, v in steps[-1].items()}, "compiled", compiled["programs"], flush=True)
        reset()

    cluster.update_actor = update

    texts = w.prompts(a.steps)
    # np.array: a plain list of str, which the annotation allows, ends in a tokenizer error.
    batches = [{"prompts": np.array(texts[i : i + w.PROMPTS])} for i in range(0, len(texts), w.PROMPTS)]
    ready = clock() - STARTED
    before = w.cpu_seconds()
    w.others()
    reset()
    learner.train(batches)
    after = w.cpu_seconds()
    options = {"micro": a.micro if a.micro != 64 else None, "remat": a.remat if a.remat != "none" else None}
    w.summary(
        " ".join(["Tunix", *(f"{k}={v}" for k, v in options.items() if v)]),
        f"google-tunix {version('google-tunix')} / jax {jax.__version__} / flax {version('flax')}",
        a.size,
        a.beta,
        steps,
        dict(
            import_s=round(imported, 2),
            ready_s=round(ready, 2),
            compile_s={k: round(v, 2) for k, v in compiled.items()},
            stolen_s=round(after[0] - before[0], 2),
            other_cpu_s=round(after[1] - before[1], 2),
        ),
        skip=a.skip,
    )


if __name__ == "__main__":
    main()
