"""A file of jobs in, a file of answers out. `batch` is the main path: it reads a `source`, sends, and writes down."""
