"""docs/methods.md and README's counts, made from the code: `python scripts/catalogue.py [--check]`.

`--check` changes nothing and fails if they are behind. What an entry says is read by `jaxrl_llm.catalogue`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxrl_llm import catalogue

ROOT = Path(__file__).parents[1]
METHODS, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
START, END = "<!-- catalogue: scripts/catalogue.py -->", "<!-- /catalogue -->"

TITLE = """# Methods

<!-- Made by scripts/catalogue.py: change the docstrings in jaxrl_llm/algorithms and run it again. -->

"""


def page(found: list[catalogue.Entry]) -> str:
    """docs/methods.md."""
    return f"{TITLE}{counts(found)}\n\n{catalogue.markdown(found)}"


def counts(found: list[catalogue.Entry]) -> str:
    """How many methods there are, of which families, and what is known of them."""
    each = {f: sum(e.family == f for e in found) for f in catalogue.FAMILIES}
    families = ", ".join(f"{family} ({n})" for family, n in each.items() if n)
    tried = sum(e.reproduced is not None for e in found)
    part = sum(e.confidence == "in part" for e in found)
    return (
        f"{len(found)} methods: {families}. An experiment of this repository has tried {tried or 'none'} of them; "
        f"{part or 'none'} are written from sources that describe the method only in part, and say so."
    )


def readme(found: list[catalogue.Entry]) -> str:
    """README with the counts between its marks."""
    text = README.read_text()
    if START not in text or END not in text:
        sys.exit(f"README.md has no {START} ... {END}")
    return f"{text.split(START)[0]}{START}\n{counts(found)}\n{END}{text.split(END)[1]}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="fail if docs/methods.md or README.md is behind the code")
    args = p.parse_args()
    try:
        found = catalogue.entries()
        made = {METHODS: page(found), README: readme(found)}
    except ValueError as error:
        sys.exit(str(error))
    for path, text in made.items():
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            sys.exit(f"{path.relative_to(ROOT)} is behind the code: run python scripts/catalogue.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
