"""New adapters: from random numbers, from a decomposition of the weights, or from data."""
