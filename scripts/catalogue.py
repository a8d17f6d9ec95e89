"""The table of methods in README, made from the code: `python scripts/catalogue.py [--check]`.

What differs is computed by `changes()` between a recipe and the one it is built from, or GRPO; the rest is read off the
docstrings. `--check` changes nothing and fails if README is behind.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import changes

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- catalogue: scripts/catalogue.py -->", "<!-- /catalogue -->"


def table() -> str:
    """One row a method."""
    rows = [
        "| method | what it is | source | slots it changes, against |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row(name))} |" for name in algorithms.names()),
    ]
    return "\n".join([START, *rows, END])


def row(name: str) -> tuple[str, str, str, str]:
    doc = inspect.getdoc(algorithms.recipe(name)) or ""
    link = f"[`{name}`](jaxrl_llm/algorithms/{name}.py)"
    return link, doc.splitlines()[0].rstrip("."), source(doc), differs(name)


def source(doc: str) -> str:
    """The first arXiv id of the docstring's source, as a link, or the source itself."""
    text = " ".join(section(doc, "Source"))
    found = re.search(r"\b(\d{4}\.\d{4,5})\b", text)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else text.split(chr(34))[0].strip(" ,.")


def section(doc: str, title: str) -> list[str]:
    lines = iter(doc.splitlines())
    for line in lines:
        if line.startswith(f"{title}:"):
            found = [line.removeprefix(f"{title}:").strip()]
            for more in lines:
                if not more.startswith("  "):
                    return found
                found.append(more.strip())
            return found
    return []


def differs(name: str) -> str:
    """The slots that differ from the parent: the recipe its file is built from, or GRPO."""
    module = inspect.getmodule(algorithms.recipe(name))
    built_from = [n for n in algorithms.names() if n != name and hasattr(module, n)]
    parent = built_from[0] if built_from else "grpo"
    if parent == name:
        return ""
    paths = changes(algorithms.load(name), algorithms.load(parent))
    slots = list(dict.fromkeys(path.split(".")[0].split("[")[0] for path in paths))
    return f"{', '.join(slots) or 'defaults only'} (`{parent}`)"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="fail if README is behind the code")
    args = p.parse_args()
    text = README.read_text()
    if START not in text or END not in text:
        sys.exit(f"README.md has no {START} ... {END}")
    before, rest = text.split(START, 1)
    new = before + table() + rest.split(END, 1)[1]
    if new == text:
        return
    if args.check:
        sys.exit("README.md's catalogue is behind the code: run python scripts/catalogue.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
