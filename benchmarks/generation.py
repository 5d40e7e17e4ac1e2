"""Rows per second of generation: our engines against the tools they are made of.

    sgpo make-demo --num-prompts 6000 --output-dir runs/many
    SGPO_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/generation.py \\
        --model runs/demo/improver --prompts runs/many/prompts/train.jsonl

Every contender is a process that has loaded its model and warmed up; they take turns on the same prompts, and
each round has prompts of its own, so that no cache knows them. Whoever waits is stopped (SIGSTOP): some poll.
Ours go the way of a stage, journal included. Then the same prompts by `sgpo gen-pairs` with one rank and with two,
a thread each: seconds of the step by its manifest, and whether the rows are the same.
Writes `benchmarks/generation.json`: rows/s per round, medians, and the ratio of each to the others by round.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ON_CPU = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 512,
    "enable_chunked_prefill": False,  # with seeds, vLLM 0.32 fails without on a CPU (see engines/vllm.py)
}
Messages = list[dict[str, str]]
Generate = Callable[[list[Messages], list[int]], int]
"""Conversations and seeds in, the number of tokens made out."""


def ours(engine: str) -> Callable[[argparse.Namespace], Generate]:
    """A pass of a stage: `batch_size` rows at a time, journaled."""

    def open_it(arguments: argparse.Namespace) -> Generate:
        from sgpo_cli import identity, recipe
        from sgpo_cli.engines import Sampling, open_engine
        from sgpo_cli.generation import Passes
        from sgpo_cli.step import Step

        options = {"engine_options": arguments.engine_options} if engine == "vllm" else {}
        opened = open_engine(engine, arguments.model, **options)
        sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)

        def generate(conversations: list[Messages], seeds: list[int]) -> int:
            with tempfile.TemporaryDirectory() as directory:
                named = {"output_dir": directory, "policy": arguments.model, "dataset": arguments.prompts}
                request = identity.request_of("gen-pairs", recipe.build_config("gen-pairs", named, "benchmark"))
                with Step(Path(directory), request) as step, Passes(step, arguments.batch_size) as passes:
                    made = passes.generate("policy", opened, conversations, sampling, seeds)
                    return sum(text.completion_tokens for text in made)

        return generate

    return open_it


def generate_8(arguments: argparse.Namespace) -> Generate:
    """transformers' `generate` in input order with batches of 8, as the SPIN script does it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    sampled = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    options = sampled if arguments.temperature else {"do_sample": False}

    def generate(conversations: list[Messages], seeds: list[int]) -> int:
        torch.manual_seed(seeds[0])
        tokens = 0
        for first in range(0, len(seeds), 8):
            texts = tokenizer.apply_chat_template(
                conversations[first : first + 8], tokenize=False, add_generation_prompt=True
            )
            inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                made = model.generate(**ids, max_new_tokens=arguments.max_new_tokens, **options)
            new = made[:, inputs.input_ids.shape[1] :]
            tokenizer.batch_decode(new, skip_special_tokens=True)
            tokens += int((new != tokenizer.pad_token_id).sum())
        return tokens

    return generate


def vllm_chat(arguments: argparse.Namespace) -> Generate:
    """Bare vLLM as its documentation shows it: all conversations in one call."""
    from vllm import LLM

    llm = LLM(arguments.model, dtype="float32", generation_config="vllm", **arguments.engine_options)

    def generate(conversations: list[Messages], seeds: list[int]) -> int:
        made = llm.chat(conversations, _parameters(arguments, seeds), use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in made)

    return generate


def vllm_in_process(arguments: argparse.Namespace) -> Generate:
    """Bare vLLM in one process, from token ids to token ids, templates not counted: the most there is."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(arguments.model, dtype="float32", generation_config="vllm", **arguments.engine_options)
    tokenizer = llm.get_tokenizer()

    def generate(conversations: list[Messages], seeds: list[int]) -> int:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        prompts = [{"prompt_token_ids": ids} for ids in tokenizer(texts, add_special_tokens=False).input_ids]
        made = llm.generate(prompts, _parameters(arguments, seeds, detokenize=False), use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in made)

    return generate


def _parameters(arguments: argparse.Namespace, seeds: list[int], **more: Any) -> list[Any]:
    from vllm import SamplingParams

    greedy = arguments.temperature == 0
    common = {"temperature": arguments.temperature, "top_p": arguments.top_p, "max_tokens": arguments.max_new_tokens}
    return [SamplingParams(**common, seed=None if greedy else seed, **more) for seed in seeds]


CONTENDERS: dict[str, tuple[str, Callable[[argparse.Namespace], Generate]]] = {
    "sgpo-transformers": ("", ours("transformers")),
    "generate-8": ("", generate_8),
    "sgpo-vllm": ("vllm", ours("vllm")),
    "vllm-chat": ("vllm", vllm_chat),
    "vllm-in-process": ("vllm", vllm_in_process),
}
"""Name: (the environment it needs, what opens it)."""
DEFAULT = ["sgpo-transformers", "generate-8", "sgpo-vllm", "vllm-chat"]


def work(arguments: argparse.Namespace) -> None:
    """A contender's process: for each number of a round on stdin, a line of JSON on stdout."""
    from sgpo_cli.artifacts import versions

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    generate = CONTENDERS[arguments.worker][1](arguments)
    rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
    prompts = [_messages(row["prompt"]) for row in rows]
    print(json.dumps(versions()), file=replies, flush=True)
    for line in sys.stdin:
        first = int(line) * arguments.rows
        seeds = list(range(first, first + arguments.rows))
        started = time.perf_counter()
        tokens = generate(prompts[first : first + arguments.rows], seeds)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=replies, flush=True)


def _messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class Worker:
    """A contender's process, stopped while others have their turn."""

    def __init__(self, name: str, pythons: dict[str, str]) -> None:
        self.name = name
        python = pythons.get(CONTENDERS[name][0], sys.executable)
        self._process = subprocess.Popen(
            [python, __file__, *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.versions = self._reply()
        self._signal(signal.SIGSTOP)

    def round(self, number: int) -> dict[str, float]:
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        print(number, file=self._process.stdin, flush=True)
        reply = self._reply()
        self._signal(signal.SIGSTOP)
        return reply

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has failed; what it said is above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _signal(self, which: signal.Signals) -> None:
        os.killpg(self._process.pid, which)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the first is the warm-up and does not count."""
    workers: list[Worker] = []
    rates: dict[str, list[float]] = {name: [] for name in arguments.contenders}
    tokens: dict[str, list[float]] = {name: [] for name in arguments.contenders}
    try:
        for name in arguments.contenders:
            workers.append(Worker(name, dict(pair.split("=", 1) for pair in arguments.python)))
        for number in range(arguments.rounds + 1):
            for worker in workers if number % 2 else reversed(workers):
                made = worker.round(number)
                print(f"round {number}: {worker.name}: {arguments.rows / made['seconds']:.1f} rows/s", flush=True)
                if number:
                    rates[worker.name].append(arguments.rows / made["seconds"])
                    tokens[worker.name].append(made["tokens"] / made["seconds"])
    finally:
        for worker in workers:
            worker.end()
    return {
        worker.name: {
            "rows_per_second": round(statistics.median(rates[worker.name]), 1),
            "tokens_per_second": round(statistics.median(tokens[worker.name])),
            "rounds": [round(rate, 1) for rate in rates[worker.name]],
            "times": {
                other: round(statistics.median(a / b for a, b in zip(rates[worker.name], theirs, strict=True)), 3)
                for other, theirs in rates.items()
                if other != worker.name
            },
            "versions": worker.versions,
        }
        for worker in workers
    }


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """gen-pairs of `--rank-rows` prompts by one rank and by two, in turn: seconds of the step, and its rows."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launches = {"one": [sys.executable], "two": torchrun}
    seconds: dict[str, list[float]] = {name: [] for name in launches}
    digests = set()
    for number in range(arguments.rounds):
        for name, launch in launches.items() if number % 2 else reversed(launches.items()):
            with tempfile.TemporaryDirectory() as directory:
                command = [*launch, "-m", "sgpo_cli", "gen-pairs", "--policy", arguments.model]
                command += ["--dataset", arguments.prompts, "--max-rows", str(arguments.rank_rows)]
                command += ["--max-new-tokens", str(arguments.max_new_tokens), "--max-length-ratio", "8"]
                command += ["--batch-size", str(arguments.rank_batch_size), "--output-dir", directory + "/pairs"]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                manifest = json.loads(Path(directory, "pairs", "manifest.json").read_text())
            seconds[name].append(manifest["seconds"])
            digests.add(manifest["outputs"]["train.jsonl"]["sha256"])
    speedup = statistics.median(one / two for one, two in zip(seconds["one"], seconds["two"], strict=True))
    same = len(digests) == 1
    return {"rows": arguments.rank_rows, "seconds": seconds, "two_over_one": round(speedup, 3), "same_rows": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON lines; `rows` of them for each round and the warm-up")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    vllm = [f"vllm={path}" for path in [os.environ.get("SGPO_VLLM_PYTHON")] if path]
    parser.add_argument("--python", nargs="*", default=vllm, metavar="vllm=PATH", help="the Python of an environment")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--engine-options", type=json.loads, default=ON_CPU, help="for all that is vLLM, as JSON")
    parser.add_argument("--rank-rows", type=int, default=6000, help="prompts for one and two ranks; 0: none")
    parser.add_argument("--rank-batch-size", type=int, default=512)
    parser.add_argument("--output", default="generation")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    import machine

    kept = ("contenders", "rows", "rounds", "batch_size", "max_new_tokens", "temperature", "top_p", "engine_options")
    results = compare(arguments)
    settings = {key: getattr(arguments, key) for key in kept}
    both = ranks(arguments) if arguments.rank_rows else None
    machine.write(arguments.output, {"settings": settings, "results": results, "ranks": both})
    for name, result in results.items():
        times = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in result["times"].items())
        print(f"{name:20} {result['rows_per_second']:8.1f} rows/s: {times}")
    if both:
        print(f"two ranks: {both['two_over_one']:.2f} x one; the same rows: {both['same_rows']}")


if __name__ == "__main__":
    main()
