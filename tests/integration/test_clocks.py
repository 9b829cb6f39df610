"""When each frame of a video is shown, whatever its container says of times, or does not say."""

import av
import numpy as np

from keye.worker.media.frames.clip import examine_clip
from tests.support.zoo import Zoo


def test_index_tells_how_many_bytes_each_frame_has_in_the_order_they_are_shown(zoo: Zoo) -> None:
    with av.open(zoo["h264.mp4"]) as container:
        sizes = {packet.pts: packet.size for packet in container.demux(video=0) if packet.size}
    with zoo["h264.mp4"].open("rb") as file:
        index = examine_clip(file, 10**8).index
    assert dict(zip(index.pts.tolist(), index.sizes.tolist(), strict=True)) == sizes
    assert np.all(np.diff(index.pts) > 0)
