"""Stand-ins for rewritten weights that answer operations without the dense weight."""
