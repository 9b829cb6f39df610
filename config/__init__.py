"""What producer and worker agree on: the job, its outcome, its events, and where they lie in Redis."""
