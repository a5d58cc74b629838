"""Shared by all public functions: names that are loaded on first use, deprecated calls, argument checks."""
