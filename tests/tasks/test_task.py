"""What tasks share: text, padding, the verifier on the host, finding tasks by name."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import tasks
from jaxrl_llm.tasks import characters as ch
from jaxrl_llm.types import Context, Prompts

TASK = tasks.load("arithmetic", digits=1)


def two_prompts():
    tokens, mask, _ = tasks.pad_tokens([ch.encode("1+2="), ch.encode("9+9=")], 6, "left")
    operands = jnp.array([[[1], [2]], [[9], [9]]])
    return Prompts(
        context=Context(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask)),
        index=jnp.arange(2),
        target={"operands": operands},
    )


def respond(*texts):
    """`[2 G 5]` from the texts, prompt by prompt, each with EOS."""
    tokens, mask, _ = tasks.pad_tokens([[*ch.encode(text), ch.EOS] for text in texts], 5, "right")
    return tokens.reshape(2, -1, 5), mask.reshape(2, -1, 5)


def with_grade(grade):
    return tasks.host_verifier(dataclasses.replace(TASK, grade=grade))


def test_pad_tokens_pads_right_and_cuts_on_the_side_asked_for():
    tokens, mask, cut = tasks.pad_tokens([[5, 6, 7, 8], [9], []], 3, "left", pad=2)
    assert tokens.tolist() == [[6, 7, 8], [9, 2, 2], [2, 2, 2]] and cut.tolist() == [True, False, False]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert tasks.pad_tokens([[5, 6, 7, 8]], 3, "right")[0].tolist() == [[5, 6, 7]]
    assert tasks.pad_tokens([], 3, "right")[0].shape == (0, 3)
    with pytest.raises(ValueError, match="side must be"):
        tasks.pad_tokens([[1]], 3, "top")


def test_decode_responses_ends_at_eos_and_shows_what_it_does_not_know():
    tokens = np.array([[[*ch.encode("1 2"), ch.EOS, 9], [3, ch.PAD, 4, 99, 5]]])
    mask = np.ones(tokens.shape, bool)
    assert tasks.decode_responses(TASK.tokenizer, tokens, mask) == [["1 2", "1PAD2\ufffd3"]]
    mask[0, 0, 3] = False  # an EOS the policy did not choose
    mask[0, 1, 1:4] = False
    assert tasks.decode_responses(TASK.tokenizer, tokens, mask) == [["1 27", "13"]]
    assert tasks.decode_prompts(TASK.tokenizer, two_prompts()) == ["1+2=", "9+9="]


def test_host_verifier_repeats_a_prompt_for_its_responses():
    seen = {}

    def grade(prompts, completions, *, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1, 0.25, None, np.float32(0.5)]

    scores = with_grade(grade)(two_prompts(), *respond(">3", "x", "", ">18"))
    np.testing.assert_array_equal(scores, np.array([[1, 0.25], [math.nan, 0.5]], np.float32))
    assert scores.dtype == np.float32
    assert seen["prompts"] == ["1+2=", "1+2=", "9+9=", "9+9="] and seen["answer"] == ["3", "3", "18", "18"]
    assert seen["completions"] == [">3", "x", "", ">18"]


def right_length_wrong_type(prompts, completions, **columns):
    return [1.0, "right"]


@pytest.mark.parametrize(
    ("grade", "error", "message"),
    [
        (lambda prompts, completions, answer: [1.0], ValueError, "lambda.* one score for each of the 2 .*got 1"),
        (lambda prompts, completions, answer: 1.0, TypeError, "lambda.* must return a list .*got float"),
        (right_length_wrong_type, TypeError, "right_length_wrong_type .*response 1 it gave 'right'"),
        (lambda prompts, completions, answer: [1.0, math.inf], ValueError, "finite"),
    ],
)
def test_host_verifier_names_a_verifier_that_returns_nonsense(grade, error, message):
    with pytest.raises(error, match=message):
        with_grade(grade)(two_prompts(), *respond(">3", ">18"))


def test_host_verifier_names_a_verifier_that_raises():
    def broken(prompts, completions, **columns):
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        with_grade(broken)(two_prompts(), *respond(">3", ">18"))
    assert "broken of task arithmetic" in caught.value.__notes__[0]


def test_host_verifier_checks_the_columns():
    task = dataclasses.replace(TASK, columns=lambda prompts: {"answer": ["3"]})
    with pytest.raises(ValueError, match="column 'answer' has 1 values for 2 prompts"):
        tasks.host_verifier(task)(two_prompts(), *respond(">3", ">18"))


def test_task_refuses_padding_that_is_eos_and_missing_sources():
    same = ch.character_tokenizer()
    same.pad_token = same.eos_token
    with pytest.raises(ValueError, match="pads with its EOS token"):
        dataclasses.replace(TASK, tokenizer=same)
    same.pad_token = None
    with pytest.raises(ValueError, match=r"has no padding token; set tokenizer\.pad_token"):
        dataclasses.replace(TASK, tokenizer=same)
    same.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        dataclasses.replace(TASK, tokenizer=same)
    with pytest.raises(ValueError, match=r"either draw .* or batches"):
        dataclasses.replace(TASK, draw=None)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        dataclasses.replace(TASK, rows=0)


def test_tasks_are_found_by_name():
    assert tasks.names() == ["arithmetic", "countdown", "counting", "gsm8k", "jsonl", "sorting"]
    assert tasks.load("sorting", longest=5).response_length == 6


@pytest.mark.parametrize("name", ["aritmetic", "task", "characters", "rows", "no_such_thing", ""])
def test_unknown_tasks_list_the_known_ones(name):
    with pytest.raises(
        ValueError, match="the tasks are arithmetic, countdown, counting, gsm8k, jsonl, sorting"
    ) as error:
        tasks.load(name)
    assert ("did you mean 'arithmetic'?" in str(error.value)) == (name == "aritmetic")


def test_unknown_and_missing_knobs_are_named():
    with pytest.raises(TypeError, match="task sorting has no knob 'lenght'; it has shortest, longest"):
        tasks.load("sorting", lenght=3)
    with pytest.raises(TypeError, match="task gsm8k needs the knob 'data'"):
        tasks.load("gsm8k")
