"""Which row of the batch each position of a tensor belongs to."""
