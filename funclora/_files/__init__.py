"""Files: atomic writes of files and folders, and the safetensors format."""
