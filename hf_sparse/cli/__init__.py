"""The command ``hf-sparse``: a file for each of its commands."""

from hf_sparse.cli.program import main

__all__ = ["main"]
