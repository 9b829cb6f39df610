"""From a reference to bytes that are here: what may be read, from where, and how much of it."""
