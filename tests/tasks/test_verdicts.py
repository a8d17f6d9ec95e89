"""Hand-written problems and responses, scored by both verifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import tasks
from jaxrl_llm.tasks import characters as ch
from jaxrl_llm.tasks.arithmetic import worked
from jaxrl_llm.tasks.countdown import DEPTH, LIMIT, evaluate
from jaxrl_llm.types import Context, Prompts

WIDTH = 72


def verdicts(task, target, texts):
    """`{text: score}` of responses to one problem, by both verifiers, which must agree. "$" is EOS, "@" padding."""
    target = {key: jnp.asarray(value)[None] for key, value in target.items()}
    context = Context(tokens=jnp.zeros((1, 1), jnp.int32), mask=jnp.ones((1, 1), bool))
    prompts = Prompts(context=context, index=jnp.zeros(1, jnp.int32), target=target)
    special = {"$": ch.EOS, "@": ch.PAD}
    tokens = np.zeros((1, len(texts), WIDTH), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        tokens[0, row, : len(text)] = [special.get(c, ch.IDS.get(c)) for c in text]
        mask[0, row, : len(text)] = True
    graph = jax.jit(task.verify)(prompts, tokens, mask)[0].tolist()
    host = tasks.host_verifier(task)(prompts, tokens, mask)[0].tolist()
    assert dict(zip(texts, graph, strict=True)) == dict(zip(texts, host, strict=True))
    return dict(zip(texts, host, strict=True))


def test_arithmetic():
    expected = {  # 347 + 586 = 933
        "7+6=13;4+8+1=13;3+5+1=9>933$": 1.0,
        ">933": 1.0,
        "nonsense>12>933$junk": 1.0,
        "933$": 0.0,
        ">0933$": 0.5,
        ">934$": 0.5,
        ">93$": 0.5,
        ">9330$": 0.5,
        ">99999999999999999999999999933$": 0.5,
        ">$": 0.0,
        "$>933": 0.0,
        "": 0.0,
        ">933 $": 0.0,
        "> 933$": 0.0,
        ">933@$": 0.0,
        "@>933$": 1.0,
        "@933$": 0.0,
        ">933>$": 0.0,
        ">+933$": 0.0,
        ">933.0$": 0.0,
    }
    task = tasks.load("arithmetic", partial_credit=0.5)
    assert verdicts(task, {"operands": [[3, 4, 7], [5, 8, 6]]}, list(expected)) == expected


@pytest.mark.parametrize("operands", [[[0, 0], [0, 0]], [[9] * 40, [9] * 40], [[9, 9]] * 10])
def test_arithmetic_at_its_ends(operands):
    task = tasks.load("arithmetic", digits=len(operands[0]), operands=len(operands))
    total = str(sum(int("".join(map(str, n))) for n in operands))
    expected = {f">{total}$": 1.0, f">{total[:-1]}$": 0.0, f">{total}0$": 0.0}
    assert verdicts(task, {"operands": operands}, list(expected)) == expected


def test_countdown():
    expected = {  # 3, 7, 12, 12 -> 45
        "3*12+12-7$": 0.5,
        "(12+3)*7-12": 0.5,
        "12*(7-3)-12$": 0.5,
        "7*3+12+12$": 1.0,
        "12+7*3+12": 1.0,
        "((12+(12))+((7)*3))$": 1.0,
        "12-(3-12)*7$": 0.5,
        "12+12+7*3)$": 0.0,
        "(12+12+7*3$": 0.0,
        "7*3+12$": 0.0,
        "7*3+24$": 0.0,
        "7*3+12+12+0$": 0.0,
        "7*3+12+12+12$": 0.0,
        "07*3+12+12$": 0.0,
        "7*3+12+12+$": 0.0,
        "+7*3+12+12$": 0.0,
        "-7+3+12+12$": 0.0,
        "7*3 +12+12$": 0.0,
        "7*3+1212$": 0.0,
        "7*3(+)12+12$": 0.0,
        "7(3)+12+12$": 0.0,
        "(7)3+12+12$": 0.0,
        "7**3+12+12$": 0.0,
        "()7*3+12+12$": 0.0,
        "7*3+12+12=45$": 0.0,
        "@7*3+12+12$": 0.0,
        "45$": 0.0,
        "9999999999999999999999+7*3+12+12$": 0.0,
        "$": 0.0,
        "": 0.0,
        "(" * DEPTH + "7" + ")" * DEPTH + "*3+12+12$": 1.0,
        "(" * (DEPTH + 1) + "7" + ")" * (DEPTH + 1) + "*3+12+12$": 0.0,
    }
    task = tasks.load("countdown", numbers=4, partial_credit=0.5)
    assert verdicts(task, {"numbers": [3, 7, 12, 12], "target": 45}, list(expected)) == expected


def test_countdown_refuses_results_beyond_the_limit_whatever_follows():
    assert 99**4 < LIMIT < 99**5 < 2**63
    expected = {  # 99, 99, 99, 99, 99, 1 -> 0
        "99*99*99*99*(99-1)": 0.0,
        "99*99*99*99+99-1": 0.5,
        "(99-99)*99*99*99*1": 1.0,
        "99*99*99*99*99*1": 0.0,
        "99*99*99*99*(1-99)": 0.0,
        "99*99*99*1*(99-99)": 1.0,
        "99*99*99*99*1*(99-99)": 0.0,  # one 99 too many
        "99*99*99*(99+99)-1": 0.5,
        "(99+99)*(99+99)*99*99-1": 0.0,  # one 99 too many
    }
    task = tasks.load("countdown", numbers=6, largest=99, limit=9999, partial_credit=0.5)
    assert verdicts(task, {"numbers": [99, 99, 99, 99, 99, 1], "target": 0}, list(expected)) == expected


def test_countdown_agrees_with_python_on_random_expressions():
    rng = np.random.default_rng(0)

    def expression(numbers):
        if len(numbers) == 1:
            return str(numbers[0])
        at = rng.integers(1, len(numbers))
        text = expression(numbers[:at]) + rng.choice(list("+-*")) + expression(numbers[at:])
        return f"({text})" if rng.random() < 0.5 else text

    task = tasks.load("countdown", numbers=6, largest=99, limit=9999, partial_credit=0.5)
    numbers = [99, 7, 12, 65, 80, 80]
    texts = list({expression(rng.permutation(numbers).tolist()): None for _ in range(400)})
    values = {text: evaluate(text, numbers) for text in texts}
    assert all(value in (None, eval(text)) for text, value in values.items())
    refused = [text for text, value in values.items() if value is None]
    assert len(refused) < 100 and all(text.count("*") >= 3 or "(" in text for text in refused)
    for target in (values[texts[0]], values[texts[7]]):
        expected = {t: 0.0 if v is None else 1.0 if v == target else 0.5 for t, v in values.items()}
        assert verdicts(task, {"numbers": numbers, "target": target}, texts) == expected


@pytest.mark.parametrize(("rule", "right"), [("up", "aabz"), ("down", "zbaa"), ("back", "aazb"), ("copy", "bzaa")])
def test_sorting(rule, right):
    task = tasks.load("sorting", longest=6, partial_credit=0.5)
    target = {"ranks": [1, 25, 0, 0, -1, -1], "length": 4, "rule": ["up", "down", "back", "copy"].index(rule)}
    expected = {right: 1.0, right + "$x": 1.0, right[:-1]: 0.0, right + "a": 0.0, "qqqq$": 0.5, "qqq1": 0.0, "": 0.0}
    expected |= {"@" + right: 0.0, right + " ": 0.0, right[:3] + "@": 0.0, "$" + right: 0.0}
    assert verdicts(task, target, list(expected)) == expected


def test_counting():
    task = tasks.load("counting", marks="|a", mean=20.0, partial_credit=0.5)
    expected = {"||||$": 1.0, "||||": 1.0, "|||$|": 0.5, "|||||$": 0.5, "||a|$": 0.0, "|||| $": 0.0, "$": 0.0, "": 0.0}
    assert verdicts(task, {"count": 4, "mark": ch.IDS["|"]}, list(expected)) == expected


def test_worked_solution_by_hand():
    rng = np.random.default_rng(0)
    assert worked(rng, 347, 586, right=1.0) == "7+6=13;4+8+1=13;3+5+1=9>933"
    assert worked(rng, 347, 586, right=0.0) == "7+6=13;4+8=12;3+5=8>823"
    assert worked(rng, 0, 0, right=1.0) == "0+0=0>0"
    assert worked(rng, 95, 7, right=1.0) == "5+7=12;9+0+1=10>102"
    assert worked(rng, 99, 99, 99, right=1.0) == "9+9+9=27;9+9+9+2=29>297"


def test_worked_forgets_each_carry_at_the_rate_asked_for():
    rng = np.random.default_rng(1)
    texts = [worked(rng, 555, 555, right=0.3) for _ in range(2000)]  # two carries to write, each on its own
    kept = np.array([[step.count("+") == 2 for step in text.split(";")[1:]] for text in texts])
    assert np.abs(kept.mean(0) - 0.3).max() < 0.04 and abs(kept.all(1).mean() - 0.09) < 0.03
    for text in texts[:50]:
        steps, _, answer = text.partition(">")
        totals = [step.partition("=") for step in steps.split(";")]
        assert all(eval(left) == int(total) for left, _, total in totals)
        assert answer == totals[-1][2] + "".join(total[-1] for _, _, total in reversed(totals[:-1]))


def test_worked_is_the_right_demonstration():
    task = tasks.load("arithmetic", digits=3)
    prompts = jax.jit(task.draw, static_argnums=1)(jax.random.key(0), 64)
    logged = jax.jit(task.demonstrate)(jax.random.key(1), prompts)
    texts = tasks.decode_responses(task.tokenizer, logged.tokens, logged.mask)
    for prompt, (right, wrong) in zip(tasks.decode_prompts(task.tokenizer, prompts), texts, strict=True):
        a, b = map(int, prompt.rstrip("=").split("+"))
        assert right == worked(np.random.default_rng(0), a, b, right=1.0) != wrong
