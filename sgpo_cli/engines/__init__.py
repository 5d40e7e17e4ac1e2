"""Engines: messages in, texts with finish reasons out, in order. They know nothing of stages.

An engine is named by a string; its module is imported when it is used, so what is not installed only
matters to who asks for it.
"""

from sgpo_cli.engines.base import Engine, Generation, LazyEngine, Sampling, check_engine, open_engine, token_counts

__all__ = ["Engine", "Generation", "LazyEngine", "Sampling", "check_engine", "open_engine", "token_counts"]
