"""Find the parameters to adapt, from a configuration and a model."""
