"""The jobs the benchmarks run: drawn media in files, and questions about them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, Thinking, VideoPart
from keye.worker.demo.scenes import draw_image_scene, draw_video_scene

GREEDY = GenerationOptions(max_new_tokens=160, temperature=0)
MODES = (Thinking.NO_THINK, Thinking.THINK, Thinking.AUTO)


def image_jobs(folder: Path, count: int) -> list[AnalysisJob]:
    """Questions about `count` JPEG files, in all thinking modes: answers of a few to about a hundred tokens."""
    jobs = []
    for i in range(count):
        scene = draw_image_scene(np.random.default_rng(i))
        path = folder / f"{i}.jpg"
        scene.image.save(path, quality=90)
        question = scene.questions[i % len(scene.questions)]
        jobs.append(_job(ImagePart(uri=str(path)), question.text, i))
    return jobs


def video_jobs(folder: Path, count: int, size: tuple[int, int] = (168, 168), fps: int = 10) -> list[AnalysisJob]:
    """Questions about `count` H.264 clips of 2 to 4 seconds; `size` is (width, height)."""
    jobs = []
    for i in range(count):
        scene = draw_video_scene(np.random.default_rng(i), size=size)
        path = folder / f"{size[0]}-{i}.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width, stream.height = scene.size
            stream.pix_fmt = "yuv420p"
            for pixels in scene.frames(fps):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        question = scene.questions[i % len(scene.questions)]
        jobs.append(_job(VideoPart(uri=str(path)), question.text, i))
    return jobs


def _job(part: ImagePart | VideoPart, prompt: str, i: int) -> AnalysisJob:
    return AnalysisJob(media=(part,), prompt=prompt, thinking=MODES[i % len(MODES)], generation=GREEDY)
