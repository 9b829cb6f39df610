"""Between the queue's lists and our task: what a message may ask, and what becomes of those that ask something else."""
