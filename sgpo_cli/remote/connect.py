"""From a stage's options to an engine that asks a server."""

import json
from typing import TYPE_CHECKING

from sgpo_cli.engines import LazyEngine, check_engine, open_engine
from sgpo_cli.errors import UsageError
from sgpo_cli.options import RemoteConfig
from sgpo_cli.remote.asker import Patience
from sgpo_cli.remote.budget import Budget, read_prices
from sgpo_cli.remote.endpoint import open_endpoint
from sgpo_cli.remote.form import RequestForm
from sgpo_cli.remote.gate import Limits
from sgpo_cli.remote.secret import read_key, redact

if TYPE_CHECKING:
    from sgpo_cli.engines.openai import OpenAIEngine


def open_generation(config: RemoteConfig, model: str) -> "LazyEngine | OpenAIEngine":
    """The engine that a stage generates with: local and loaded when it is needed, or servers.

    Raises:
        UsageError: no such engine, or no address for it.
    """
    if config.engine == "openai":
        if config.engine_options:
            raise UsageError("engine_options are for --engine vllm", "leave them out")
        if config.base_url is None:
            raise UsageError("--engine openai needs --base-url", "for example --base-url http://localhost:8000/v1")
        return connect(config, model, config.base_url, config.api_key_env, config.api_key_file, interchangeable=True)
    check_engine(config.engine)
    settings = {
        "dtype": config.dtype,
        "chat_template_kwargs": config.chat_template_kwargs,
        "engine_options": config.engine_options,
    }
    return LazyEngine(lambda: open_engine(config.engine, model, **settings))


def connect(
    config: RemoteConfig, model: str, urls: str, key_env: str, key_file: str | None, *, interchangeable: bool = False
) -> "OpenAIEngine":
    """The engine for `model` at the addresses; sends nothing yet.

    Args:
        interchangeable: an answer is the same wherever it comes from, so the address is not part of a request's
            identity: servers of one's own come and go with the job that runs them.

    Raises:
        UsageError: an address, key or price that cannot be right.
    """
    prices = read_prices(config.price)
    if config.max_cost is not None and prices is None:
        raise UsageError("--max-cost needs --price", 'for example --price \'{"input": 2.5, "output": 10}\'')
    key = read_key(key_env, key_file)
    for option, text in (("address", urls), ("model", model), ("--extra-body", json.dumps(config.extra_body))):
        if key is not None and redact(text) != text:
            raise UsageError(f"the {option} contains the API key, and would be written to disk", "leave it out there")
    endpoints = [open_endpoint(url, key, allow_insecure=config.allow_insecure) for url in urls.split(",")]

    from sgpo_cli.engines.openai import OpenAIEngine, Terms  # imports the package

    template = config.chat_template_kwargs
    extra = {"chat_template_kwargs": template} if template and interchangeable else {}
    if key is None and any(endpoint.url.startswith("https://api.openai.com") for endpoint in endpoints):
        raise UsageError("no API key: OPENAI_API_KEY is not set", "export it, or name your own server's address")
    form = RequestForm(
        "" if interchangeable else ",".join(sorted(endpoint.url for endpoint in endpoints)),
        model,
        extra=extra | config.extra_body,
        drop=config.drop_params,
        max_tokens_field=config.max_tokens_field,
        reasoning_effort=config.reasoning_effort,
    )
    patience = Patience(config.request_timeout, config.max_attempts, config.max_wait, config.max_outage)
    limits = Limits(config.concurrency, config.requests_per_minute, config.tokens_per_minute)
    terms = Terms(
        limits,
        patience,
        prices,
        Budget(config.max_cost, config.max_tokens),
        config.max_failed,
        thinking=config.thinking == "keep",
    )
    return OpenAIEngine(endpoints, form, terms)
