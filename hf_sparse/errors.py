"""Errors a user can act on."""


class PatchError(ValueError):
    """A model cannot be patched as asked; it was left as it was."""
