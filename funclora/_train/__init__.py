"""Training steps, populations, evaluation, and the module that trainers take."""
