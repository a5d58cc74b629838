"""Training steps, populations, evaluation, and the module for trainers."""
