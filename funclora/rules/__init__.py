"""Rules: what an adapter does to one weight."""
