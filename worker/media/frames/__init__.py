"""Of a video: its packets, which frames are read, and reading them."""
