"""What touches torch's own machinery: every private name of torch stands here, with the reason for it."""
