"""Weights stored in few bits that pass for dense ones."""
