"""What the caller hears: events while a job runs, and its outcome."""
