"""benchmarks/gpu.py on a tiny shape: the file works, whatever a GPU's figures will be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.model]


def test_the_gpu_benchmark_writes_its_figures(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--shape", "tiny", "--rounds", "1"]
    command += ["--parts", "generation", "scoring", "--work", tmp_path / "work", "--output", tmp_path / "figures"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["shape"], set(figures["results"])) == ("tiny", {"generation", "scoring"})
    generation = figures["results"]["generation"]
    assert set(generation) == {"ours", "plain", "continuous"}
    for name, found in generation.items():
        assert found.get("tokens_per_second", 0) > 0, (name, found)
        assert found["times"] > 0
        assert len(found["rounds"]) == 1
    assert figures["results"]["scoring"]["tokens_per_second"] > 0
