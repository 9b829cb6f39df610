"""Keye-VL: text and pixels to logits. Knows nothing of queues, jobs or media files."""
