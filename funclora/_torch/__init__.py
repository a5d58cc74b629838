"""Code that uses torch's internals: every private name of torch is used here, with the reason for it."""
