"""Tasks whose prompts are rows of a file and whose verifier reads text."""

from __future__ import annotations

import functools
import itertools
import logging
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxrl_llm.tasks.rows import Table
from jaxrl_llm.tasks.task import Report, Task, check_tokenizer, pad_tokens
from jaxrl_llm.types import Context, Logged, Prompts

log = logging.getLogger(__name__)


def host_task(
    *,
    name: str,
    train: Table,
    test: Table,
    field: str,
    grade: Callable[..., list[float | None]],
    tokenizer: Any = None,
    vocab_size: int = 2048,
    prompt_length: int,
    response_length: int,
    template: str | None,
    logged: bool,
) -> Task:
    """A task from two tables.

    Args:
      field: name of the prompt column, which the template may use.
      grade: as in `Task`; its column is `answer`.
      tokenizer: a `transformers` tokenizer or the path of one; None trains `byte_pair_tokenizer` on the training rows.
      template: the prompt, with `{field}` where the question stands; None is the tokenizer's chat template if it has
          one (the question as the user's turn), else `"Question: {field}\\nAnswer:"`.
      logged: put the solutions into `Prompts.logged` `[B 1 T]` with reward 1, as demonstrations.

    Raises:
      ValueError: a template without the field or with others, or an unfit tokenizer.
    """
    tokenizer = _load(tokenizer)
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        template = f"Question: {{{field}}}\nAnswer:"
    if template is not None:
        _check_template(template, field)
    if tokenizer is None:
        assert template is not None
        texts = (template.format(**{field: p}) + " " + s for p, s in zip(train.prompts, train.solutions, strict=True))
        tokenizer = byte_pair_tokenizer(texts, vocab_size)
    check_tokenizer(tokenizer, name)

    questions = [*train.prompts, *test.prompts]
    prompts = _encode_prompts(tokenizer, questions, template, field)
    tokens, mask, cut = pad_tokens(prompts, prompt_length, "left", tokenizer.pad_token_id)
    arrays: dict[str, Any] = {"tokens": tokens, "mask": mask}
    report = Report(
        train=len(train.prompts),
        test=len(test.prompts),
        skipped=train.skipped + test.skipped,
        cut_train=int(cut[: len(train.prompts)].sum()),
        cut_test=int(cut[len(train.prompts) :].sum()),
        cut_responses=_add_logged(arrays, tokenizer, train, test, response_length) if logged else 0,
        shared=sum(p in set_ for set_ in [set(train.prompts)] for p in test.prompts),
        longest=max(map(len, prompts)),
    )
    log.log(logging.WARNING if report.skipped or cut.any() or report.cut_responses else logging.INFO, "%s", report)
    rows = len(train.prompts)
    return Task(
        name=name,
        tokenizer=tokenizer,
        rows=rows,
        prompt_length=prompt_length,
        response_length=response_length,
        test=functools.partial(_test, arrays, rows),
        grade=grade,
        columns=functools.partial(_columns, train.answers + test.answers),
        batches=functools.partial(_batches, arrays, rows),
        report=report,
    )


def byte_pair_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, padding 0 and EOS 1, digits one by one.

    Every text can be encoded, and `decode(encode(text)) == text`.

    Raises:
      ValueError: `vocab_size` below the 256 bytes and two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, padding, EOS), got {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def _load(tokenizer: Any) -> Any:
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer


def _check_template(template: str, field: str) -> None:
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template {template!r} is not a format string: {error}") from None
    if used != {field}:
        raise ValueError(f"template must contain {{{field}}} and no other field, got {template!r}")


def _encode_prompts(tokenizer: Any, questions: list[str], template: str | None, field: str) -> list[list[int]]:
    if template is not None:
        texts = [template.format(**{field: question}) for question in questions]
        ids = tokenizer(texts)["input_ids"]
    else:
        turns = [[{"role": "user", "content": question}] for question in questions]
        texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written them
    # Some tokenizers end every text with EOS; a prompt goes on.
    return [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else list(row) for row in ids]


def _add_logged(arrays: dict[str, Any], tokenizer: Any, train: Table, test: Table, length: int) -> int:
    solutions = [" " + s.strip() for s in train.solutions + test.solutions]
    ids = tokenizer(solutions, add_special_tokens=False)["input_ids"]
    rows = [[*row, tokenizer.eos_token_id] for row in ids]
    tokens, mask, cut = pad_tokens(rows, length, "right", tokenizer.pad_token_id)
    arrays |= {"logged_tokens": tokens, "logged_mask": mask}
    return int(cut.sum())


def _take(arrays: dict[str, Any], rows: int, chosen: np.ndarray) -> Prompts:
    """The chosen rows. Held-out rows follow the training rows in the arrays and share their ids, modulo `rows`."""
    picked = {key: jax.numpy.asarray(value[chosen]) for key, value in arrays.items()}
    logged = None
    if "logged_tokens" in picked:
        tokens, mask = picked["logged_tokens"][:, None], picked["logged_mask"][:, None]
        logged = Logged(tokens=tokens, mask=mask, reward=jax.numpy.ones(tokens.shape[:2], np.float32))
    return Prompts(
        context=Context(tokens=picked["tokens"], mask=picked["mask"]),
        index=jax.numpy.asarray(chosen % rows, np.int32),
        target={"row": jax.numpy.asarray(chosen, np.int32)},
        logged=logged,
    )


def _test(arrays: dict[str, Any], rows: int, n: int) -> Prompts:
    held_out = len(arrays["tokens"]) - rows
    if not 1 <= n <= held_out:
        raise ValueError(f"the test set has {held_out} problems, asked for {n}")
    return _take(arrays, rows, rows + np.arange(n))


def _batches(
    arrays: dict[str, Any], rows: int, seed: int, n: int, start: int = 0, part: slice = slice(None)
) -> Iterator[Prompts]:
    """Batch `i` is the same whether or not the ones before it were taken; a batch may span two epochs."""
    for batch in itertools.count(start):
        places = np.arange(batch * n, (batch + 1) * n)
        epochs = {int(epoch): _shuffled(rows, seed, int(epoch)) for epoch in np.unique(places // rows)}
        yield _take(arrays, rows, np.array([epochs[int(p // rows)][p % rows] for p in places[part]]))


@functools.lru_cache(maxsize=4)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _columns(answers: tuple[str, ...], prompts: Prompts) -> dict[str, list[Any]]:
    return {"answer": [answers[int(row)] for row in np.asarray(prompts.target["row"])]}
