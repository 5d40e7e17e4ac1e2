"""From what the user named to raw records: `sources` finds the reader, `text` and `tables` are the readers,
`strict` says what a value may be. What columns mean is for `sgpo_cli/schema.py`."""
