"""Weights stored in few bits that behave like dense weights."""
