"""The stages: each reads directories and writes one, through a single `run(config, step)`.

Stages never import each other; they meet on disk.
"""
