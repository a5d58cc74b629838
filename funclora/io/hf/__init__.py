"""Folders of transformers models: their files, structure and weights."""
