"""Builds the documentation site from the Markdown of the repository."""
