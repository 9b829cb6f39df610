"""The jobs of the demo: draws their media, and knows what a right worker answers. Sends nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, Thinking, VideoPart
from keye.worker.demo.questions import Question
from keye.worker.demo.scenes import VideoScene, draw_image_scene, draw_video_scene

Upload = Callable[[Path], str]
"""Puts a file into the demo's bucket and gives its `s3://` address."""


@dataclass(frozen=True)
class Errand:
    """A job and how it must end: with the answer `expected`, or failed with that error code.

    `gloss` is question and answer in English, for a picture whose font knows no Chinese.
    """

    label: str
    job: AnalysisJob
    expected: str | ErrorCode
    picture: Image.Image | None
    gloss: tuple[str, str] | None = None


def draw_errands(folder: Path, upload: Upload) -> list[Errand]:
    """Write the media into `folder` and list the jobs that ask about them."""
    errands = []

    def ask(label: str, part: ImagePart | VideoPart, picture: Image.Image, question: Question, **asked: object) -> None:
        job = AnalysisJob.model_validate(
            {"media": [part], "prompt": question.text, "generation": GenerationOptions(max_new_tokens=160), **asked}
        )
        errands.append(Errand(label, job, question.answer, picture))

    shapes = draw_image_scene(np.random.default_rng(1), num_shapes=3)
    path = folder / "shapes.jpg"
    shapes.image.save(path, quality=90)
    for kind in ("caption", "count", "background"):
        ask(path.name, ImagePart(uri=str(path)), shapes.image, _english(shapes.questions, kind))

    scene = draw_image_scene(np.random.default_rng(2), num_shapes=2)
    path = folder / "two.webp"
    scene.image.save(path, lossless=True)
    chinese = next(q for q in scene.questions if q.kind == "caption" and q.language == "zh")
    english = _english(scene.questions, "caption")
    ask(path.name, ImagePart(uri=f"file://{path}"), scene.image, chinese, thinking=Thinking.NO_THINK)
    errands[-1] = Errand(path.name, errands[-1].job, chinese.answer, scene.image, (english.text, english.answer))

    scene = draw_image_scene(np.random.default_rng(3), num_shapes=1)
    path = folder / "one.png"
    scene.image.save(path)
    uri = upload(path)
    ask(uri, ImagePart(uri=uri), scene.image, _english(scene.questions, "where"), thinking=Thinking.NO_THINK)

    moving = _first_video(lambda scene: scene.event in ("left", "right", "up", "down"))
    path = folder / "moving.mp4"
    _encode(moving, path, "libx264")
    ask(path.name, VideoPart(uri=str(path)), moving.frame(0), _english(moving.questions, "which way"))

    changing = _first_video(lambda scene: scene.event not in ("left", "right", "up", "down"))
    path = folder / "changing.webm"
    _encode(changing, path, "libvpx-vp9")
    becomes = _english(changing.questions, "becomes")
    ask(path.name, VideoPart(uri=str(path)), changing.frame(changing.seconds), becomes, thinking=Thinking.THINK)

    missing = AnalysisJob(media=(ImagePart(uri=str(folder / "missing.png")),), prompt="What is in the image?")
    errands.append(Errand("missing.png", missing, ErrorCode.MEDIA_NOT_FOUND, None))

    path = folder / "cut_off.jpg"
    path.write_bytes((folder / "shapes.jpg").read_bytes()[:900])
    corrupt = AnalysisJob(media=(ImagePart(uri=str(path)),), prompt="What is in the image?")
    errands.append(Errand(path.name, corrupt, ErrorCode.MEDIA_CORRUPT, None))
    return errands


def _english(questions: tuple[Question, ...], kind: str) -> Question:
    return next(q for q in questions if q.kind == kind and q.language == "en")


def _first_video(wanted: Callable[[VideoScene], bool]) -> VideoScene:
    scenes = (draw_video_scene(np.random.default_rng(seed), size=(168, 168)) for seed in range(100))
    return next(scene for scene in scenes if wanted(scene))


def _encode(scene: VideoScene, path: Path, codec: str, fps: int = 10) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = scene.size
        stream.pix_fmt = "yuv420p"
        for pixels in scene.frames(fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
