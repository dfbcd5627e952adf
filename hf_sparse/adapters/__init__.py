"""How the MLP blocks of a model are found: by structure, confirmed by behaviour, never by class name."""

from hf_sparse.adapters.block import Block
from hf_sparse.adapters.find import Skipped, find_blocks, require_blocks

__all__ = ["Block", "Skipped", "find_blocks", "require_blocks"]
