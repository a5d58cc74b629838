"""Many adapters as one value: stacks, and a different adapter for each row."""
