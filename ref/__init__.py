"""Sequence models with every forward and backward pass written out, to check other code against."""

__version__ = "0.1.0"


class Error(Exception):
    """What the user can put right: what was expected, what came, what to do."""
