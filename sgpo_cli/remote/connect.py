"""From a stage's options to an engine that asks a server."""

from typing import TYPE_CHECKING

from sgpo_cli.configs import RemoteConfig
from sgpo_cli.errors import UsageError
from sgpo_cli.remote.asker import Patience
from sgpo_cli.remote.budget import Budget, read_prices
from sgpo_cli.remote.endpoint import open_endpoint
from sgpo_cli.remote.form import RequestForm
from sgpo_cli.remote.gate import Limits
from sgpo_cli.remote.secret import read_key

if TYPE_CHECKING:
    from sgpo_cli.engines.openai import OpenAIEngine


def connect(config: RemoteConfig, model: str, url: str, key_env: str, key_file: str | None) -> "OpenAIEngine":
    """The engine for `model` at `url`; sends nothing yet.

    Raises:
        UsageError: an address, key or price that cannot be right.
    """
    prices = read_prices(config.price)
    if config.max_cost is not None and prices is None:
        raise UsageError("--max-cost needs --price", 'for example --price \'{"input": 2.5, "output": 10}\'')
    endpoint = open_endpoint(url, read_key(key_env, key_file), allow_insecure=config.allow_insecure)

    from sgpo_cli.engines.openai import OpenAIEngine, Terms  # imports the package

    form = RequestForm(
        endpoint.url,
        model,
        extra=config.extra_body,
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
    return OpenAIEngine(endpoint, form, terms)
