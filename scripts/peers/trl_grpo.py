"""TRL's GRPOTrainer (Hugging Face generate, no vLLM) on the workloads of workload.py.

    bash setup.sh DIR                                            # once: its environment and the checkpoints
    BENCH_CKPT=DIR/ckpt DIR/trl/bin/python trl_grpo.py --size tiny --beta 0 --steps 12

Prints a line a step and `RESULT {json}` at the end; the seconds of a step are split into gen, ref, score and update.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
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
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing (TRL's default)")
    p.add_argument("--compile", action="store_true", help="torch_compile=True")
    p.add_argument("--cache", default=None, help="cache_implementation, e.g. static")
    p.add_argument("--continuous", action="store_true", help="transformers' continuous batching")
    p.add_argument("--attention", default=None, help="attn_implementation")
    return p.parse_args()


def main() -> None:
    a = arguments()
    if a.tail:
        os.environ["BENCH_TAIL"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    import transformers
    import trl
    import workload as w
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    imported = clock() - STARTED
    folder = w.checkpoint(a.size)
    # Not AutoTokenizer: next to a qwen2 config.json it silently loads a Qwen2Tokenizer.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    attention = dict(attn_implementation=a.attention) if a.attention else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention)
    config = GRPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "trl_out"),
        max_steps=a.steps,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=a.micro,
        gradient_accumulation_steps=w.ROWS // a.micro,
        num_generations=w.GROUP,
        max_completion_length=w.NEW,
        temperature=1.0,
        beta=a.beta,
        num_iterations=1,
        loss_type="grpo",
        learning_rate=w.LR,
        weight_decay=w.WD,
        max_grad_norm=w.CLIP,
        lr_scheduler_type="constant",
        gradient_checkpointing=a.checkpointing,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=a.compile,
        cache_implementation=a.cache,
        use_transformers_continuous_batching=a.continuous,
        log_completions=False,
    )

    steps: list[dict[str, float]] = []
    now: dict[str, Any] = {}

    def reset() -> None:
        now.update(gen=0.0, ref=0.0, prepared=0.0, lengths=[], prompt=0, since=clock())

    class Timed(GRPOTrainer):
        """Stop-watches only; no behaviour changes."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            t = clock()
            result = super()._generate_single_turn(*args, **kwargs)
            now["gen"] += clock() - t
            now["lengths"] += [len(ids) for ids in result[0]]
            return result

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            t = clock()
            result = super()._generate_and_score_completions(inputs)
            now["prepared"] += clock() - t
            now["prompt"] = result["prompt_ids"].shape[1]
            return result

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            t = clock()
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                now["ref"] += clock() - t
            return result

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            reset()
            w.others()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step = clock() - now["since"]
            w.check_lengths(now["lengths"])
            assert now["prompt"] == w.PLEN, now["prompt"]
            score = now["prepared"] - now["gen"] - now["ref"]
            row = dict(step=step, gen=now["gen"], ref=now["ref"], score=score, update=step - now["prepared"])
            steps.append(row | dict(new_tokens=sum(now["lengths"]), oth=w.others()))
            print({k: round(v, 3) for k, v in steps[-1].items()}, flush=True)
            reset()

    trainer = Timed(
        model=model,
        reward_funcs=w.reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in w.prompts(a.steps)]),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    ready = clock() - STARTED
    before = w.cpu_seconds()
    trainer.train()
    after = w.cpu_seconds()
    options = {
        "micro": a.micro if a.micro != 64 else None,
        "checkpointing": a.checkpointing,
        "compile": a.compile,
        "cache": a.cache,
        "continuous": a.continuous,
        "attention": a.attention,
    }
    w.summary(
        " ".join(["TRL", *(f"{k}={v}" for k, v in options.items() if v)]),
        f"trl {trl.__version__} / transformers {transformers.__version__} / torch {torch.__version__}",
        a.size,
        a.beta,
        steps,
        dict(
            import_s=round(imported, 2),
            ready_s=round(ready, 2),
            threads=torch.get_num_threads(),
            attention=model.config._attn_implementation,
            optimiser=str(config.optim),
            stolen_s=round(after[0] - before[0], 2),
            other_cpu_s=round(after[1] - before[1], 2),
        ),
        skip=a.skip,
    )


if __name__ == "__main__":
    main()
