"""From bytes to pixels, in processes of their own. What the frames of a video are: `frames`."""
