"""Grade-school mathematics: GSM8K (Cobbe et al. 2021, arXiv 2110.14168) from its two files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrl_llm.tasks.answers import gold_answer, grade_number
from jaxrl_llm.tasks.host import host_task
from jaxrl_llm.tasks.rows import read_rows
from jaxrl_llm.tasks.task import Task


def gsm8k(
    *,
    data: Path | str,
    tokenizer: Any = None,
    vocab_size: int = 2048,
    prompt_length: int = 256,
    response_length: int = 256,
    template: str | None = None,
    skip_bad_rows: bool = False,
    logged: bool = False,
) -> Task:
    """Questions of `train.jsonl` and `test.jsonl` in the folder `data`.

    A row is `{"question": "...", "answer": "... #### 18"}`.

    A response is right (1) if its last number after `####` is the row's answer; without one, its last number; compared
    as exact fractions, so `18`, `$18.00` and `36/2` are the same. Everything else is 0.

    Args:
      tokenizer: a `transformers` tokenizer or its path; None trains a byte-level BPE of `vocab_size` on the training
          rows.
      prompt_length: longer prompts lose their start, which `Task.report` counts.
      template: `"... {question} ..."`; None is the tokenizer's chat template, else `"Question: {question}\\nAnswer:"`.
      skip_bad_rows: leave malformed rows out and list them in `Task.report` instead of raising.
      logged: give the written solutions as demonstrations in `Prompts.logged`.

    Raises:
      DataError: a malformed row, by file, line and field, before anything else runs.
      FileNotFoundError: a file is missing.
    """
    train, test = (
        read_rows(
            Path(data) / file, prompt="question", answer="answer", extract=gold_answer, skip_bad_rows=skip_bad_rows
        )
        for file in ("train.jsonl", "test.jsonl")
    )
    return host_task(
        name="gsm8k",
        train=train,
        test=test,
        field="question",
        grade=grade_number,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        prompt_length=prompt_length,
        response_length=response_length,
        template=template,
        logged=logged,
    )
