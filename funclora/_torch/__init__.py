"""What touches torch's own machinery: private or fragile parts of torch and Python, each with the reason and the version seen."""
