"""SGPO: self-generated preference optimization on the TRL ecosystem (arXiv 2507.20181)."""

__version__ = "0.1.0"
