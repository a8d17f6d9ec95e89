"""README's table of methods says what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_is_not_behind_the_code():
    command = [sys.executable, str(ROOT / "scripts" / "catalogue.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
