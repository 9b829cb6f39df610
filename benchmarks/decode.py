"""64 frames of a long clip, and photos, to the model's size: ours against what one would write with each library."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from mmap import mmap
from pathlib import Path

import av
import numpy as np
from PIL import Image

NUM_FRAMES = 64
SIZE = (364, 420)  # height, width
CLIP_SECONDS, NUM_JOINS = 30, 20
NUM_PHOTOS, PHOTO_SIZE, MODEL_PIXELS = 200, (3000, 4000), 1280 * 28 * 28
ROUNDS = 3
# Libraries that keep whole frames take more than this, and would take the machine down.
MAX_ADDRESS_BYTES = 12 * 2**30


def run() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return "\n".join((_report_videos(Path(folder)), _report_photos(Path(folder))))


def ours(clip: str) -> Callable[[], object]:
    from config.job import VideoPart
    from worker.media.decode_video import decode_video

    part = VideoPart(uri=clip, max_frames=NUM_FRAMES)

    def read() -> object:
        with open(clip, "rb") as file:
            return decode_video(file, "clip", part, lambda _part, num, _h, _w: (num, SIZE, SIZE), 10**8, 2**30)

    return read


def pyav_by_hand(clip: str) -> Callable[[], object]:
    """Seek to each time, decode on to the frame, resize it."""

    def read() -> object:
        frames = []
        with av.open(clip) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for target in np.linspace(0, stream.duration - 1, NUM_FRAMES).astype(int).tolist():
                container.seek(target, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts + frame.duration > target:
                        frames.append(frame.reformat(SIZE[1], SIZE[0], "rgb24").to_ndarray())
                        break
        return np.stack(frames)

    return read


def torchcodec_exact(clip: str) -> Callable[[], object]:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read() -> object:
        decoder = VideoDecoder(clip, transforms=[Resize(SIZE)])
        return decoder.get_frames_at(np.linspace(0, len(decoder) - 1, NUM_FRAMES).astype(int).tolist()).data

    return read


def decord_resizing(clip: str) -> Callable[[], object]:
    from decord import VideoReader

    def read() -> object:
        reader = VideoReader(clip, width=SIZE[1], height=SIZE[0])
        return reader.get_batch(np.linspace(0, len(reader) - 1, NUM_FRAMES).astype(int).tolist()).asnumpy()

    return read


def keye_vl_utils_reader(clip: str) -> Callable[[], object]:
    from keye_vl_utils.vision_process import fetch_video

    return lambda: fetch_video(
        {"video": clip, "nframes": NUM_FRAMES, "resized_height": SIZE[0], "resized_width": SIZE[1]}
    )


def photos_ours(photo: str) -> Callable[[], object]:
    from worker.media.decode_image import decode_image
    from worker.model.image_processing import fit_size

    def fit(height: int, width: int) -> tuple[int, int]:
        return fit_size(height, width, factor=28, min_pixels=28 * 28, max_pixels=MODEL_PIXELS)

    def read() -> object:
        for _ in range(NUM_PHOTOS):
            with open(photo, "rb") as file:
                decode_image(file, "photo", 10**8, 2**30, _shared_pixels, fit)
        return None

    return read


def photos_pillow(photo: str) -> Callable[[], object]:
    """Pillow's draft mode, then a resize."""
    from worker.model.image_processing import fit_size

    def read() -> object:
        for _ in range(NUM_PHOTOS):
            with Image.open(photo) as image:
                height, width = fit_size(*image.size[::-1], factor=28, min_pixels=28 * 28, max_pixels=MODEL_PIXELS)
                image.draft("RGB", (width, height))
                image.resize((width, height), Image.Resampling.BICUBIC)
        return None

    return read


VIDEO_READERS = (ours, pyav_by_hand, torchcodec_exact, decord_resizing, keye_vl_utils_reader)
PHOTO_READERS = (photos_ours, photos_pillow)


def _report_videos(folder: Path) -> str:
    clip = _make_clip(folder)
    lines = [
        f"{NUM_FRAMES} frames of a {CLIP_SECONDS * NUM_JOINS // 60}-minute 1080p H.264 clip to {SIZE[1]}x{SIZE[0]}; "
        f"a process each, medians of {ROUNDS} rounds.",
        "",
        "| | CPU s | ratio | wall s | peak memory above import |",
        "|---|---|---|---|---|",
        *_rows(VIDEO_READERS, str(clip)),
    ]
    return "\n".join(lines) + "\n"


def _report_photos(folder: Path) -> str:
    photo = folder / "photo.jpg"
    Image.fromarray(_picture(*PHOTO_SIZE)).save(photo, quality=90)
    lines = [
        f"{NUM_PHOTOS} JPEG photos of 12 megapixels to {MODEL_PIXELS / 1e6:.1f}, one core.",
        "",
        "| | CPU s | ratio | wall s | peak memory above import |",
        "|---|---|---|---|---|",
        *_rows(PHOTO_READERS, str(photo)),
    ]
    return "\n".join(lines) + "\n"


def _rows(readers: tuple[Callable[[str], Callable[[], object]], ...], path: str) -> Iterator[str]:
    measured: dict[str, list[dict[str, float]]] = {reader.__name__: [] for reader in readers}
    missing: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name in measured.keys() - missing.keys():
            command = [sys.executable, "-m", "benchmarks.decode", name, path]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                missing[name] = f"{(process.stderr.strip() or 'killed').splitlines()[-1]:.60}"
            else:
                measured[name].append(json.loads(process.stdout.splitlines()[-1]))
    base = None
    for name, rounds in measured.items():
        if name in missing:
            yield f"| {name.replace('_', ' ')} | not measured: {missing[name]} | | | |"
            continue
        cpu, wall, memory = (statistics.median(r[key] for r in rounds) for key in ("cpu", "wall", "memory"))
        base = base or cpu
        yield f"| {name.replace('_', ' ')} | {cpu:.1f} | {cpu / base:.2f} | {wall:.1f} | {memory / 2**20:.0f} MiB |"


def _measure(name: str, path: str) -> dict[str, float]:
    read = globals()[name](path)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    before, wall, cpu = _peak_bytes(), time.perf_counter(), time.process_time()
    read()
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "memory": _peak_bytes() - before,
    }


def _shared_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """Fresh pages, as a decoder child gets them from its worker."""
    return np.frombuffer(mmap(-1, prod(shape)), np.uint8).reshape(shape)


def _peak_bytes() -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _make_clip(folder: Path) -> Path:
    """Half a minute encoded, then joined to itself packet by packet."""
    piece, whole = folder / "piece.mp4", folder / "clip.mp4"
    rate = 30
    with av.open(piece, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "26"})
        stream.height, stream.width, stream.pix_fmt = 1080, 1920, "yuv420p"
        picture = np.tile(_picture(1080, 1920), (1, 2, 1))
        grain = np.random.default_rng(1).integers(0, 12, (8, 1080, 1920, 1), dtype=np.uint8)
        for number in range(CLIP_SECONDS * rate):
            moved = picture[:, 2 * number : 2 * number + 1920] + grain[number % len(grain)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        container.mux(stream.encode(None))
    with av.open(piece) as source, av.open(whole, "w") as joined:
        template = source.streams.video[0]
        copy = joined.add_stream_from_template(template)
        ticks = round(CLIP_SECONDS / template.time_base)
        for join in range(NUM_JOINS):
            source.seek(0)
            for packet in source.demux(template):
                if packet.dts is not None:
                    packet.pts += join * ticks
                    packet.dts += join * ticks
                    packet.stream = copy
                    joined.mux(packet)
    return whole


def _picture(height: int, width: int) -> np.ndarray:
    """Slopes, edges and a little grain, as photos have them."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    slopes = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], axis=-1) * 200
    blocks = rng.integers(0, 120, (height // 40 + 1, width // 40 + 1, 3)).repeat(40, 0).repeat(40, 1)[:height, :width]
    return (slopes * 0.6 + blocks + rng.normal(0, 6, (height, width, 3))).clip(0, 240).astype(np.uint8)


if __name__ == "__main__":
    os.environ["DECORD_EOF_RETRY_MAX"] = "128"
    print(json.dumps(_measure(*sys.argv[1:])))
