"""The client for OpenAI-compatible endpoints: it survives bad nights, never pays twice and never leaks a key.

Nothing here imports a web library: requests go out through one function (`engines/openai.py`), so the
policy (`gate`, `asker`), the reading of answers (`answer`) and the log of what was paid (`paid`) stand alone.
"""
