"""Jobs that run in the process that asks, without a queue."""
