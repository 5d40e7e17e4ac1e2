"""The remote client beside the bare `openai` client, and its memory from ten thousand to a million rows.

    python benchmarks/client.py    # writes benchmarks/client.json

Throughput: a local server that answers in 50 ms (tests/fault_server.py, a process of its own), concurrency
64, the two clients in turn, medians. Bare: `chat.completions.create` with `max_retries=0` under a semaphore
in one `asyncio.gather`, the answers thrown away. Ours: log, checks, gate, progress and all.
Memory: the same engine with the network cut out (a function that answers at once), one process per size.
"""

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from machine import write

from sgpo_cli.engines import Sampling
from sgpo_cli.engines import openai as engine_module
from sgpo_cli.engines.openai import OpenAIEngine, Terms
from sgpo_cli.generation import Lazy
from sgpo_cli.remote.asker import Patience, Response
from sgpo_cli.remote.endpoint import open_endpoint
from sgpo_cli.remote.form import RequestForm
from sgpo_cli.remote.gate import Limits
from sgpo_cli.remote.paid import Paid

CONCURRENCY, LATENCY, CALLS, ROUNDS = 64, 0.05, 3000, 5
SERVER = Path(__file__).parents[1] / "tests" / "fault_server.py"


def conversations(count: int, mark: str) -> Sequence[list[dict[str, str]]]:
    return Lazy(count, lambda n: [{"role": "user", "content": f"{mark}: what of thing number {n}?"}])


def engine(url: str) -> OpenAIEngine:
    endpoint = open_endpoint(url, None)
    return OpenAIEngine([endpoint], RequestForm(endpoint.url, "m"), Terms(Limits(CONCURRENCY), Patience()))


def ours(url: str, mark: str) -> float:
    with tempfile.TemporaryDirectory() as directory, Paid(Path(directory)) as paid:
        started = time.perf_counter()
        asked = engine(url).ask_all(paid, conversations(CALLS, mark), Sampling(64, 0.0), range(CALLS), "ours")
        seconds = time.perf_counter() - started
        assert asked.facts["requests"] == CALLS
    return CALLS / seconds


def bare(url: str, mark: str) -> float:
    from openai import AsyncOpenAI

    async def run() -> float:
        async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
            semaphore = asyncio.Semaphore(CONCURRENCY)

            async def call(messages: Any) -> None:
                async with semaphore:
                    await client.chat.completions.create(model="m", messages=messages, max_tokens=64, temperature=0.0)

            started = time.perf_counter()
            await asyncio.gather(*map(call, conversations(CALLS, mark)))
            return CALLS / (time.perf_counter() - started)

    return asyncio.run(run())


def throughput() -> dict[str, Any]:
    server = subprocess.Popen(
        [sys.executable, SERVER, "--port", "0", "--latency", str(LATENCY)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        bare(url, "warm"), ours(url, "warm-ours")
        rounds = [(bare(url, f"b{n}"), ours(url, f"o{n}")) for n in range(ROUNDS)]
    finally:
        server.terminate()
        server.wait()
    return {
        "calls_per_round": CALLS,
        "concurrency": CONCURRENCY,
        "latency_seconds": LATENCY,
        "ideal_calls_per_second": CONCURRENCY / LATENCY,
        "bare_calls_per_second": round(statistics.median(b for b, _ in rounds), 1),
        "ours_calls_per_second": round(statistics.median(o for _, o in rounds), 1),
        "ratio_median": round(statistics.median(o / b for b, o in rounds), 3),
        "ratios": [round(o / b, 3) for b, o in rounds],
    }


def peak_memory(rows: int) -> None:
    """In a process of its own: ask for so many rows without a network, and print the peak in MiB."""
    answer = {"choices": [{"message": {"content": "x" * 200}, "finish_reason": "stop"}], "model": "m"}
    content = json.dumps(answer | {"usage": {"prompt_tokens": 100, "completion_tokens": 50}}).encode()

    @asynccontextmanager
    async def connection(*_: Any, **__: Any) -> AsyncIterator[Any]:
        async def send(body: Any) -> Response:
            await asyncio.sleep(0)
            return 200, {}, content

        yield send

    engine_module.connection = connection  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as directory, Paid(Path(directory)) as paid:
        texts = (
            engine("http://127.0.0.1:9/v1")
            .ask_all(paid, conversations(rows, "memory"), Sampling(64, 0.0), range(rows), "memory")
            .texts
        )
        assert sum(len(text.text) for text in texts) == 200 * rows
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory() -> dict[str, float]:
    sizes = (10_000, 100_000, 1_000_000)
    peaks = {
        size: float(subprocess.check_output([sys.executable, __file__, "--memory-of", str(size)], text=True))
        for size in sizes
    }
    return {f"{size}_rows_mib": round(peak, 1) for size, peak in peaks.items()} | {
        "difference_mib": round(peaks[sizes[-1]] - peaks[sizes[0]], 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-of", type=int)
    options = parser.parse_args()
    if options.memory_of:
        peak_memory(options.memory_of)
        return
    write("client", {"throughput": throughput(), "memory": memory()})


if __name__ == "__main__":
    main()
