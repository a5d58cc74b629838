"""Hyperparameter searches whose candidates are trained together, as populations."""
