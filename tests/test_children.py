"""What becomes of the processes of a launch, without a launcher's cost."""

import sys
from pathlib import Path

import pytest

from sgpo_cli import children

RANK = """
import os, sys
from sgpo_cli.exits import mapped
with mapped(debug=False):
    os.kill(os.getpid(), 9) if sys.argv[1] == "lost" else sys.exit(int(sys.argv[1]))
"""
LAUNCHER = """
import os, subprocess, sys
for rank, code in enumerate(sys.argv[2:]):
    subprocess.run([sys.executable, "-c", sys.argv[1], code], env=os.environ | {"RANK": str(rank)})
sys.exit(int(set(sys.argv[2:]) != {"0"}))
"""


@pytest.mark.parametrize(
    ("codes", "code"),
    [("0 0", 0), ("143 8", 8), ("5 1", 5), ("1 lost", 7), ("lost 2", 2), ("1 143", 1), ("143 143", 143), ("", 1)],
)
def test_a_launch_ends_with_the_exit_code_that_says_most(tmp_path: Path, codes: str, code: int) -> None:
    """The last one is a launcher that fails before it starts anybody."""
    launcher = [sys.executable, "-c", LAUNCHER, RANK, *codes.split()]
    assert children.run(launcher, tmp_path / "ranks") == code
    assert not (tmp_path / "ranks").exists()
