"""Data flows down: a file imports only from what stands above it."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxrl_llm"
SLOTS = ("prompts", "rollouts", "rewards", "filters", "advantages", "weights", "losses", "updates")
SHARED = {"types", "stats", "contexts", "models"}


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_folders_import_shared_parts_and_their_own(slot):
    for path in sorted((PACKAGE / slot).glob("*.py")):
        names = set(re.findall(r"^\s*(?:from|import) jaxrl_llm(?:\.| import )(\w+)", path.read_text(), flags=re.M))
        assert names <= SHARED | {slot}, f"{path.name} imports {sorted(names - SHARED)}"


def test_files_are_short():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 400, path
