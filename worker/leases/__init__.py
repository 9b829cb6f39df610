"""Whose job it is: claims, renewals, and jobs of dead workers put back. Nothing here knows what a job does."""
