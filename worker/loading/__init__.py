"""A checkpoint folder to an engine that has answered once."""
