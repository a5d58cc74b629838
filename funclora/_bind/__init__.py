"""A model under rewritten weights: `bind`, `apply`, `merge`."""
