"""What ships with the package: a tiny pretrained Llama, and English text that every Python carries."""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "pydoc-llama"
"""Folder of the embedded model, for ``from_pretrained``; made by ``examples/pretrain_tiny.py``."""

__all__ = ["TINY_MODEL"]
