"""Whether the model computes here what the released reference computed, and the data that tells."""
