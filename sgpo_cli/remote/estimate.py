"""What a server would be asked, and what that would cost: an estimate without a request."""

from collections.abc import Iterable, Sequence

from sgpo_cli.engines.base import Message
from sgpo_cli.options import RemoteConfig
from sgpo_cli.remote.answer import estimate_tokens
from sgpo_cli.remote.budget import read_prices

PER_MESSAGE = 4  # tokens around a message: role and markers
GROWTH = 1.2  # an improved answer is a little longer than the reference
TOKENS_PER_SECOND = 50.0  # of one request at a hosted model; for the time alone
FIRST_TOKEN_SECONDS = 1.0


def estimate(
    config: RemoteConfig, conversations: Sequence[list[Message]], references: Iterable[str], max_new_tokens: int
) -> list[str]:
    """Lines to print: rows, tokens, money, time.

    Args:
        references: texts about as long as the answers will be.
    """
    prompt = sum(
        sum(estimate_tokens(message["content"]) + PER_MESSAGE for message in messages) for messages in conversations
    )
    output = sum(min(round(estimate_tokens(text) * GROWTH), max_new_tokens) for text in references)
    rows = len(conversations)
    seconds = rows * (FIRST_TOKEN_SECONDS + output / rows / TOKENS_PER_SECOND) / config.concurrency
    bound = f"{config.concurrency} requests at a time, {TOKENS_PER_SECOND:g} tokens/s each"
    for rate, amount, name in (
        (config.requests_per_minute, rows, "requests"),
        (config.tokens_per_minute, prompt + output, "tokens"),
    ):
        if rate and amount / rate * 60 > seconds:
            seconds, bound = amount / rate * 60, f"{rate:g} {name} a minute"
    prices = read_prices(config.price)
    money = _money(prices.cost(prompt, output)) if prices else "unknown; --price tells the price per million tokens"
    lines = [
        f"rows           {rows:>12,}",
        f"prompt tokens  {prompt:>12,}  (estimated, from the length of the texts)",
        f"output tokens  {output:>12,}  (estimated, references x {GROWTH:g}; a reasoning model's thinking is extra)",
        f"cost           {money:>12}"
        + (f"  (as a batch {_money(prices.cost(prompt, output, batch=True))})" if prices else ""),
        f"time           {_span(seconds):>12}  (at {bound})",
        "nothing was sent; what was paid for earlier is not subtracted",
    ]
    return lines


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
