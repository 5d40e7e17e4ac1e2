"""What the numbers were measured on; every benchmark's JSON carries it."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from sgpo_cli.artifacts import versions

HERE = Path(__file__).parent


def describe() -> dict[str, Any]:
    """Processor, cores, system and versions; no names of machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def write(name: str, figures: dict[str, Any]) -> None:
    """Write `benchmarks/<name>.json`."""
    text = json.dumps({"machine": describe(), **figures}, indent=1)
    (HERE / f"{name}.json").write_text(text + "\n")
