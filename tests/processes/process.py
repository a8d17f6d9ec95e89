"""One process of a run in several, for tests: `python process.py WHAT FOLDER`, and the variables of distributed.start.

Prints a line of JSON for everything a test wants to know.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from jaxrl_llm import algorithms, checkpoint, distributed, sharding, tasks
from jaxrl_llm.engine import learner
from jaxrl_llm.models.model import Model
from jaxrl_llm.policy import language_model
from jaxrl_llm.run import run
from jaxrl_llm.updates.optimizer import adamw

sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))
from recurrent import recurrent

PROMPTS = 8


def say(**values):
    print(json.dumps({"process": jax.process_index(), **values}), flush=True)


def host_task(folder):
    """Rows of a file, and a verifier on the host that remembers how many rows it was asked about."""
    file = folder / f"rows{os.environ.get('JAX_PROCESS_ID', '')}.jsonl"
    rows = [{"prompt": f"{i}", "answer": str(i)} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load("jsonl", data=file, vocab_size=258, prompt_length=16, response_length=4, template="{prompt}")
    read = []

    def grade(prompts, completions, answer):
        asked.append(len(prompts))
        return [float(len(set(c)) + int(a) % 3) for c, a in zip(completions, answer, strict=True)]

    def batches(seed, n, start=0, part=slice(None)):
        for batch in task.batches(seed, n, start=start, part=part):
            read.append(batch.index.shape[0])
            yield batch

    asked: list[int] = []
    return dataclasses.replace(task, grade=grade, batches=batches), asked, read


def mesh_of(count: int):
    return sharding.mesh(data=2, fsdp=count // 2) if count > 2 else sharding.mesh(fsdp=count)


def model_of(vocab: int) -> Model:
    return recurrent(vocab)


def parts_of(task, mesh, **options):
    return learner(
        algorithms.load("reinforce"),
        policy=language_model(model_of(len(task.tokenizer))),
        task=task,
        mesh=mesh,
        optimizer=adamw(1e-2),
        prompts_per_step=PROMPTS,
        **options,
    )


def steps(mesh, verify, folder, count=2):
    """Losses of a few steps on rows of a file, and who read and verified what."""
    task, asked, read = host_task(folder)
    parts = parts_of(task, mesh, verify=verify)
    prompts = distributed.batches(mesh, task, 0, PROMPTS)
    state, metrics = run(parts, None, count, state=parts.init(jax.random.key(0)), prompts=prompts)
    losses = np.stack([metrics[name] for name in ("loss", "reward/mean", "grad_norm")], axis=1).tolist()
    say(what=verify, losses=losses, asked=asked, read=read)
    return parts, state, prompts


def rest(parts, state, prompts, count=2):
    """All metrics of more steps, to the last bit."""
    _, metrics = run(parts, None, count, state=state, prompts=prompts)
    say(what="rest", metrics={name: np.asarray(x, np.float64).tolist() for name, x in metrics.items()})


def resumed(mesh, folder):
    """Goes on from what `save` left, as a new process."""
    task, _, _ = host_task(folder)
    parts = parts_of(task, mesh)
    like = sharding.shaped(mesh, jax.eval_shape(parts.init, jax.random.key(0)))
    state = checkpoint.load(folder / "state", like)
    rest(parts, state, distributed.batches(mesh, task, 0, PROMPTS, start=int(state.step)))


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if "JAX_PROCESS_ID" in os.environ:
        distributed.start(heartbeat=int(os.environ.get("HEARTBEAT", "60")))
    mesh = mesh_of(len(jax.devices()))
    distributed.meet(mesh)
    say(what="met", devices=len(jax.devices()), local=len(jax.local_devices()))
    if "resume" in what:
        return resumed(mesh, folder)
    parts, state, prompts = steps(mesh, "inside", folder)
    if "save" in what:
        checkpoint.save(folder / "state", state)
        whole = distributed.on_host(state.params)
        if whole is not None:
            np.savez(folder / "params.npz", **{str(i): x for i, x in enumerate(jax.tree.leaves(whole))})
        rest(parts, state, prompts)
    if "load" in what:
        like = sharding.shaped(mesh, jax.eval_shape(parts.init, jax.random.key(0)))
        read = checkpoint.load(folder / "state", like)
        assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, like)
        found = distributed.on_host(read.params)
        if found is not None:
            saved = np.load(folder / "params.npz")
            same = [np.array_equal(x, saved[str(i)]) for i, x in enumerate(jax.tree.leaves(found))]
            say(what="loaded", same=all(same), step=int(read.step))
    if "between" in what:
        steps(mesh, "between", folder)
    if "kill" in what:
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run(parts, None, 10**6, state=state, prompts=prompts)


if __name__ == "__main__":
    main()
