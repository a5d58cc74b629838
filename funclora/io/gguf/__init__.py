"""llama.cpp's adapter files."""
