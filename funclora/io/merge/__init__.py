"""Merging adapters into checkpoint folders of any size."""
