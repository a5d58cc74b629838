"""Files: atomic writes, folders written as a whole, and the safetensors format."""
