"""The catalogue of methods: what each is, read from its docstring and from the recipe itself.

Nothing here is a list to keep up to date, except `FAMILIES`: a method is an entry because its file is in algorithms/.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import SLOTS, changes, describe, show

FAMILIES = {
    "policy gradient": "The methods that the others change: the score-function gradient, with a baseline or a critic.",
    "preference": "Responses are compared: logged pairs, or differences of reward between a prompt's own samples.",
    "supervised and mixed data": "Imitation of demonstrations, solutions or one's own best, alone or beside RL.",
    "objective and clipping": "What the loss of a token or a response is: other ratios, clips, gates and regressions.",
    "divergence and entropy": "What holds the policy near another one, or its entropy where it should be.",
    "credit": "Which groups, responses, turns or tokens have how much of the gradient.",
    "sampling and curricula": "Which prompts are answered, how often, in what context, and what of it is kept.",
    "rewards and budgets": "What is paid for beside the verifier's outcome, and what a response may cost.",
    "optimiser and structure": "How a step is taken: the update, its optimiser, further models and their copies.",
    "without gradients": "The parameters are searched, not differentiated.",
}

VERDICTS = Path(__file__).parent / "data" / "verdicts.json"

# Said in `Deviations` where the paper was not known in full.
IN_PART = re.compile(r"\b(in part|partial|partly|not at hand)\b")

ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a method is from. `text` is all the docstring says; the first clause names the paper."""

    text: str
    title: str | None
    arxiv: str | None
    link: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """`default` is a plain value, or an expression if it is a function; `note` says what is not from the paper."""

    name: str
    default: Any
    meaning: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an experiment of this repository found, by the name of its folder."""

    experiment: str
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A method.

    summary: what it is, in a line; `details` is what the docstring says further.
    parent: the recipe its file is built from, else `grpo`; None for `grpo`.
    changes: `{path: (the parent's, its own)}`, both with their default arguments.
    confidence: "in part" if the paper was not known in full, else "whole".
    reproduced: None if no experiment has tried.
    """

    name: str
    family: str
    summary: str
    details: str
    source: Source
    deviations: str
    limit: str
    raises: str
    confidence: str
    parent: str | None
    changes: dict[str, tuple[str, str]]
    arguments: tuple[Argument, ...]
    reproduced: Verdict | None

    @property
    def slots(self) -> list[str]:
        """The slots that differ from the parent's, in the order of a step."""
        changed = {re.split(r"[.\[]", path)[0] for path in self.changes}
        return [slot for slot in (*SLOTS, "measures") if slot in changed]


def entries(family: str | None = None) -> list[Entry]:
    """Every method, or those of a family, by name.

    Raises:
      ValueError: there is no such family.
    """
    wanted = None if family is None else find_family(family)
    return [e for e in map(entry, algorithms.names()) if wanted in (None, e.family)]


def entry(name: str) -> Entry:
    """One method.

    Raises:
      ValueError: there is no such method.
    """
    doc = inspect.getdoc(algorithms.recipe(name)) or ""
    summary, details, said = sections(doc)
    deviations = _paragraph(said, "Deviations")
    origin = parent(name)
    return Entry(
        name=name,
        family=_paragraph(said, "Family").rstrip("."),
        summary=summary,
        details=details,
        source=source(_paragraph(said, "Source")),
        deviations=deviations,
        limit=_paragraph(said, "Limit"),
        raises=_paragraph(said, "Raises"),
        confidence=confidence(deviations),
        parent=origin,
        changes={} if origin is None else changes(algorithms.load(name), algorithms.load(origin)),
        arguments=arguments(name, said.get("Args", [])),
        reproduced=verdicts().get(name),
    )


def find_family(text: str) -> str:
    """The family of that name, or the only one whose name contains the text.

    Raises:
      ValueError: none, or several.
    """
    found = [f for f in FAMILIES if text.lower() in f]
    if text.lower() in FAMILIES or len(found) == 1:
        return text.lower() if text.lower() in FAMILIES else found[0]
    words = {part: family for family in FAMILIES for part in (*family.split(), family)}
    near = difflib.get_close_matches(text.lower(), words, n=1)
    hint = f"did you mean {words[near[0]]!r}?" if near and not found else f"there are {', '.join(found or FAMILIES)}"
    raise ValueError(f"no family {text!r}; {hint}")


def parent(name: str) -> str | None:
    """The recipe that a method's expression starts from, else the first that its file has, else `grpo`."""
    function = algorithms.recipe(name)
    here = vars(inspect.getmodule(function)).items()
    others = [n for n, f in here if n != name and getattr(f, "__module__", "") == f"{algorithms.__name__}.{n}"]
    used = [n for n in inspect.unwrap(function).__code__.co_names if n in others]
    return next(iter(used + others), None if name == "grpo" else "grpo")


@cache
def verdicts(path: Path = VERDICTS) -> dict[str, Verdict]:
    """`{method: {"experiment": name, "verdict": text}}`; a method that is not there has not been tried."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    for name, verdict in found.items():
        if set(verdict) != {"experiment", "verdict"}:
            raise ValueError(f"{path}: {name} needs an experiment and a verdict, and has {', '.join(sorted(verdict))}")
    return {name: Verdict(**verdict) for name, verdict in found.items()}


# --- docstrings -------------------------------------------------------------------------------------------------------


def sections(doc: str) -> tuple[str, str, dict[str, list[str]]]:
    """First line, further text, and the lines of each section (`Title: ...` and what is indented below it)."""
    summary, *rest = doc.splitlines() or [""]
    details: list[str] = []
    found: dict[str, list[str]] = {}
    into = details
    for line in rest:
        if title := re.match(r"(Source|Deviations|Limit|Family|Args|Raises):\s*(.*)", line):
            into = found[title[1]] = [title[2]]
        elif into is details or line.startswith("  "):
            into.append(line)
    return summary.rstrip("."), "\n".join(details).strip(), found


def source(text: str) -> Source:
    """The title, quoted or before the arXiv id, and the id, if the first clause has them."""
    clause = text.split(";", maxsplit=1)[0]
    found, quoted = ARXIV.search(clause), re.search(r'"([^"]*)"', clause)
    before = clause[: found.start()].strip(" ,") if found else ""
    arxiv = found[0] if found else None
    return Source(
        text=text,
        title=quoted[1] if quoted else before or None,
        arxiv=arxiv,
        link=arxiv and f"https://arxiv.org/abs/{arxiv}",
    )


def confidence(deviations: str) -> str:
    """Whether the paper was known in full, by its own admission; code (`partial(...)`) says nothing of it."""
    return "in part" if IN_PART.search(re.sub(r"`[^`]*`", "", deviations)) else "whole"


def arguments(name: str, lines: list[str]) -> tuple[Argument, ...]:
    """Every argument of a recipe with what its docstring says of it; `a, b: ...` says it of both."""
    said: dict[str, str] = {}
    current: list[str] = []
    for line in lines:
        if start := re.match(r"  (\w+(?:, \w+)*): ?(.*)", line):
            current = start[1].split(", ")
            said |= dict.fromkeys(current, start[2])
        elif line.strip():
            said |= {n: f"{said[n]} {line.strip()}" for n in current}
    found = []
    for p in inspect.signature(algorithms.recipe(name)).parameters.values():
        meaning, _, note = said.get(p.name, "").partition("  # ")
        found.append(Argument(name=p.name, default=_plain(p.default), meaning=meaning.strip(), note=note.strip()))
    return tuple(found)


def _paragraph(said: dict[str, list[str]], title: str) -> str:
    return " ".join(line.strip() for line in said.get(title, [])).strip()


def _plain(value: Any) -> Any:
    """Numbers, text, None and tuples of them as they are; anything else, and what JSON lacks, as an expression."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else show(value)


# --- for readers ------------------------------------------------------------------------------------------------------


def markdown(found: list[Entry], files: str = "../jaxrl_llm/algorithms") -> str:
    """Tables, one a family; `files` is the way to the recipes.

    Raises:
      ValueError: a method has no family.
    """
    if lost := [e for e in found if e.family not in FAMILIES]:
        raise ValueError(f"jaxrl_llm/algorithms/{lost[0].name}.py: {_no_family(lost[0])}")
    lines: list[str] = []
    for family, sentence in FAMILIES.items():
        members = [e for e in found if e.family == family]
        if members:
            lines += [f"## {family[0].upper()}{family[1:]}", "", sentence, ""]
            lines += ["| method | what it is | source | slots it changes, against | limit | reproduced |"]
            lines += ["|---|---|---|---|---|---|", *(_row(e, files) for e in members), ""]
    return "\n".join(lines).rstrip() + "\n"


def _no_family(e: Entry) -> str:
    says = f"the family {e.family!r} is not known" if e.family else "the docstring has no line `Family: ...`"
    return f"{says}; there are {', '.join(FAMILIES)}"


def _row(e: Entry, files: str) -> str:
    link = e.source.link and f"[{e.source.arxiv}]({e.source.link})"
    origin = ", ".join(part for part in (e.source.title, link) if part) or e.source.text
    part = " (described only in part)" if e.confidence == "in part" else ""
    against = f"{', '.join(e.slots) or 'defaults only'} (`{e.parent}`)" if e.parent else ""
    cells = [f"[`{e.name}`]({files}/{e.name}.py)", e.summary, origin + part, against, e.limit, reproduced(e)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def reproduced(e: Entry) -> str:
    """The verdict and the experiment it is from, or that nobody has tried."""
    return f"{e.reproduced.verdict} ({e.reproduced.experiment})" if e.reproduced else "not tried"


def table(found: list[Entry], width: int) -> str:
    """Name, family, source and summary in columns, a line a method; the summary is cut at the width, 0 for none."""
    rows = [("method", "family", "source", "what it is")]
    rows += [(e.name, e.family or "none", e.source.arxiv or "-", e.summary) for e in found]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join(line if not width or len(line) <= width else f"{line[: width - 3]}..." for line in lines)


def plain_text(e: Entry, width: int = 100) -> str:
    """A method as a page: docstring, arguments, expression, what differs from the parent, verdict."""
    paragraphs = [f"{e.name}: {e.summary}.", *(" ".join(p.split()) for p in e.details.split("\n\n") if p)]
    said = {
        "Source": e.source.text,
        "Link": e.source.link,
        "Deviations": e.deviations,
        "Confidence": "the paper was known only in part" if e.confidence == "in part" else None,
        "Limit": e.limit,
        "Raises": e.raises,
        "Family": e.family,
        "Reproduced": reproduced(e),
    }
    blocks = [
        *(_wrapped(p, width) for p in paragraphs),
        "\n".join(_wrapped(f"{title}: {text}", width, "  ") for title, text in said.items() if text),
        "\n".join(["Arguments:", *(_wrapped(_argument(a), width, "      ") for a in e.arguments)])
        if e.arguments
        else "",
        f"Expression:\n{describe(algorithms.load(e.name))}",
        "\n".join([f"Differs from {e.parent}:", *_changed(e)]) if e.parent else "",
    ]
    return "\n\n".join(block for block in blocks if block)


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _argument(a: Argument) -> str:
    return f"  {a.name}={a.default}: {a.meaning}{f' ({a.note})' if a.note else ''}"


def _changed(e: Entry) -> list[str]:
    lines = [line for path, (old, new) in e.changes.items() for line in (f"  {path}", f"    - {old}", f"    + {new}")]
    return lines or ["  in nothing but the defaults of its arguments"]
