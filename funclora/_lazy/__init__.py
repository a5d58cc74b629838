"""Placeholders for rewritten weights that compute operations without the dense weight."""
