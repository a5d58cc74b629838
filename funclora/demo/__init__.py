"""A small frozen byte-level language model and its texts, for demonstrations that need no download."""
