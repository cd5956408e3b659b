"""Sequence models with every forward and backward pass written out:
a reference to check other code against."""

__version__ = "0.1.0"


class Error(Exception):
    """Something the user can put right. The message is one or two sentences: what was expected,
    what came, what to do."""
