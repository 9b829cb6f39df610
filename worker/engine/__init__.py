"""The engine: many sequences, one forward pass a step. Knows nothing of queues, leases or media files."""
