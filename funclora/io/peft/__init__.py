"""PEFT folders: reading, writing, combining."""
