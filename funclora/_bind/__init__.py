"""A model with rewritten weights: `bind`, `apply`, `merge`."""
