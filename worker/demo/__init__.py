"""The small trained Keye that ships with the project: its scenes, its training, its checkpoint."""
