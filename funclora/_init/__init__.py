"""New adapters: fresh, from a decomposition of the weights, or from data."""
