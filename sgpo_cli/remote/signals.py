"""Ctrl-C and a scheduler's signals inside an event loop."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def gently(stop: Callable[[bool], None]) -> Iterator[list[int]]:
    """Ctrl-C and the scheduler's signals stop the asking gently, the second one at once.

    Yields the signals that came; the caller raises the first again when the loop has come to rest.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        caught.append(number)
        stop(len(caught) > 1)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            loop.add_signal_handler(number, handle, number)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
