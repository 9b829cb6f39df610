"""The engine: many sequences, one forward pass a step. Knows nothing of queues, jobs or media files."""
