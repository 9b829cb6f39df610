"""A clip made here and now: H.264 in MP4, which every reader of videos reads."""

from io import BytesIO

import av
import numpy as np

NUM_FRAMES = 8


def encode_sample_clip() -> BytesIO:
    """A second of 64 x 64 pixels, ever brighter."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=NUM_FRAMES, width=64, height=64, pix_fmt="yuv420p")
        for number in range(NUM_FRAMES):
            picture = np.full((64, 64, 3), 255 * number // NUM_FRAMES, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    file.seek(0)
    return file
