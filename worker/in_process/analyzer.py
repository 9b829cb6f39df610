"""`keye.Analyzer`: a client that loads the model itself, and the names that people know from scripts."""

import logging
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.config.contract import Contract
from keye.config.event import TextGenerated
from keye.config.familiar_names import OF_A_WORKER
from keye.config.faults import InvalidSettings, JobNotFound, Refusal
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, Thinking, VideoPart
from keye.config.outcome import JobResult, WorkerIdentity
from keye.config.settings import Settings
from keye.config.wire import SealedJob
from keye.producer.client import Client
from keye.producer.following import End
from keye.producer.many import batches
from keye.producer.medium import is_many
from keye.producer.upload import Media
from keye.worker.in_process.local_media import LocalMedia
from keye.worker.in_process.transport import InProcessEvents, InProcessTransport
from keye.worker.loading.before_torch import secure_torch
from keye.worker.media.job_media import DecoderPool
from keye.worker.model.checkpoint_files import read_generation
from keye.worker.tasks.workbench import Workbench

if TYPE_CHECKING:
    from keye.producer.fields import Medium

log = logging.getLogger(__name__)

_OF_PARTS = (ImagePart.model_fields | VideoPart.model_fields).keys() - {"type", "uri"}
_OF_GENERATION = GenerationOptions.model_fields.keys() | {"do_sample"}


class Analyzer(Client):
    """A `Client` whose jobs run here: one model, one engine, no Redis, and no process that outlives this one.

    >>> with Analyzer("/srv/models/Keye-VL-8B-Preview") as analyzer:
    ...     print(analyzer.analyze("photo.jpg", "What is it?").answer)

    All of a client's verbs are here, and any number of threads may ask: what they ask is answered together. A job has
    one attempt. Of those that have ended the newest 10,000 can be read. `AsyncClient(analyzer)` is the same for
    asyncio.
    """

    def __init__(self, model_path: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        """`model_path` is the folder of a checkpoint, by default KEYE_MODEL_PATH; `settings` are those of a worker, by
        their names in lower case without KEYE_: `precision="int8"`, `device="cpu"`.

        They come before the environment. Unless they are set, local media may lie anywhere, and https: is allowed.
        Raises `InvalidSettings`, and what loading does: `CheckpointFault` where the folder is no whole checkpoint.
        """
        self._settings = chosen = _settings(model_path, settings)
        if (checkpoint := chosen.model_path) is None:
            raise InvalidSettings("KEYE_MODEL_PATH: it is not set. Set it, or write Analyzer(path), with a folder.")
        secure_torch(chosen.cache_folder)
        # Imports torch.
        from keye.worker.loading.served_model import load_served_model

        with ExitStack() as begun:
            self._folder = Path(tempfile.mkdtemp(prefix="keye-"))
            begun.callback(shutil.rmtree, self._folder, ignore_errors=True)
            chosen = chosen.model_copy(update={"media_roots": (*chosen.media_roots, self._folder)})
            decoders = begun.enter_context(DecoderPool.of(chosen))
            served = load_served_model(chosen)
            begun.callback(served.engine.stop)
            self._transport = transport = InProcessTransport(self._folder)
            bench = Workbench.of(
                chosen,
                inbox=served.engine.inbox,
                processor=served.processor,
                sampling=served.sampling,
                model=served.model,
                decoders=decoders,
                events=InProcessEvents(transport),
                worker=WorkerIdentity(host=socket.gethostname(), pid=os.getpid(), device=served.device),
            )
            transport.start(bench)
            begun.callback(transport.close)
            # Also where it is only dropped: the next one could not load beside it. At exit, too: else the interpreter
            # would end under the engine's thread.
            self._close = weakref.finalize(self, _close, begun.pop_all(), os.getpid())
        for warning in served.warnings:
            log.warning("%s", warning)
        # Where the checkpoint says not to draw, as transformers would.
        self._drawing: dict[str, Any] = {}
        if not served.sampling["temperature"]:
            self._drawing["temperature"] = read_generation(checkpoint).get("temperature") or 1.0

    def analyze(
        self,
        image: "Medium | Iterable[Medium]",
        prompt: str,
        *,
        thinking_mode: Thinking | str = Thinking.AUTO,
        **options: Any,
    ) -> JobResult:
        """What the model says of an image, a video, or a list of them: each a path or URI, bytes of a file, a PIL
        picture, an array, or a part with options of its own.

        `options` are those of an answer (`max_new_tokens`, `temperature`, `seed`, also `do_sample`), of every medium
        (`max_pixels`, of videos `fps` and `max_frames`) and of the job (`deadline_seconds`, `metadata`), all side by
        side. Raises `InvalidJob`, and `JobFailed` with a code.
        """
        job = self.submit(**self._fields(image, prompt, thinking_mode, options))
        with self._cancelled_if_left([job.id]):
            return job.result()

    def video(
        self, video: "Medium", prompt: str, *, thinking_mode: Thinking | str = Thinking.AUTO, **options: Any
    ) -> JobResult:
        """As `analyze`, of what is read as a video: `fps` frames a second, the model's own 2 without."""
        return self.analyze(_part(video, {"type": "video"}), prompt, thinking_mode=thinking_mode, **options)

    def batch(
        self,
        images: "Iterable[Medium | Iterable[Medium]]",
        prompts: str | Iterable[str],
        *,
        thinking_mode: Thinking | str = Thinking.AUTO,
        **options: Any,
    ) -> list[End]:
        """As `analyze` for each of them, with one prompt for all or one each; answered together, in their order.

        In the place of one that has no answer stands its `JobFailure`, or the `InvalidJob` that it is. Raises that only
        where `options` are wrong, and `ValueError` where images and prompts are not as many.
        """
        if not is_many(images):
            raise TypeError("batch asks about many images, each by itself: give a list of them, or another iterable.")
        # Told once, and not of each.
        AnalysisJob(**self._fields({"type": _kind_of(options), "uri": "/"}, "?", thinking_mode, options))
        media = list(images)
        questions = [prompts] * len(media) if isinstance(prompts, str) else list(prompts)
        if len(media) != len(questions):
            raise ValueError(f"{len(media)} images and {len(questions)} prompts. Give one prompt for all, or one each.")
        asked = (self._fields(*each, thinking_mode, options) for each in zip(media, questions, strict=True))
        job_ids: list[str] = []

        def sealed() -> Iterator[list[SealedJob | Refusal]]:
            for jobs in batches(self.seal_all(asked), first=1):
                job_ids.extend(job.job_id for job in jobs if isinstance(job, SealedJob))
                yield jobs

        with self._cancelled_if_left(job_ids):
            return list(self._ask_ahead(sealed()))

    def stream(
        self,
        image: "Medium | Iterable[Medium]",
        prompt: str,
        *,
        thinking_mode: Thinking | str = Thinking.AUTO,
        **options: Any,
    ) -> Iterator[TextGenerated]:
        """As `analyze`, but the text as it is written. Who stops reading cancels the job."""
        job = self.submit(**self._fields(image, prompt, thinking_mode, options))

        def read() -> Iterator[TextGenerated]:
            with self._cancelled_if_left([job.id]):
                yield from (event for event in job.events() if isinstance(event, TextGenerated))
                job.result()

        return read()

    def close(self) -> None:
        """Cancel all jobs, and give back the device's memory, the decoders and what lies in files."""
        self._close()

    def _media(self) -> Media:
        return LocalMedia(self._folder)

    @contextmanager
    def _cancelled_if_left(self, job_ids: Sequence[str]) -> Iterator[None]:
        """By an error or an end that is not the jobs' own, as by Ctrl-C."""
        try:
            yield
        except BaseException:
            for job_id in job_ids:
                # Not queued yet, or ended so long ago that nobody knows it.
                with suppress(JobNotFound):
                    self.job(job_id).cancel()
            raise

    def _fields(self, media: Any, prompt: str, thinking: Thinking | str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of a job, as `submit` takes them."""
        of_parts = {name: value for name, value in options.items() if name in _OF_PARTS}
        generation = {name: value for name, value in options.items() if name in _OF_GENERATION}
        rest = {name: value for name, value in options.items() if name not in {*of_parts, *generation}}
        if isinstance(generation.get("do_sample"), bool):
            draws = generation.pop("do_sample")
            generation = self._drawing | generation if draws else generation | {"temperature": 0}
        parts = [_part(each, of_parts) for each in (media if is_many(media) else (media,))]
        return {"prompt": prompt, "media": parts, "thinking": thinking, "generation": generation, **rest}


def _close(begun: ExitStack, pid: int) -> None:
    # What a forked child drops is its parent's. Who does not want to wait for the end presses Ctrl-C again.
    if os.getpid() == pid:
        with suppress(KeyboardInterrupt):
            begun.close()


def _settings(model_path: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> Settings:
    if unknown := [name for name in given if name not in Settings.model_fields]:
        raise InvalidSettings("; ".join(map(_tell_unknown, unknown)))
    named = {} if model_path is None else {"model_path": os.fspath(model_path)}
    settings = Settings.read(**given, **named)
    # What whoever runs a process may read, its jobs may; strangers send none.
    wider = {"media_roots": (Path("/"),), "allow_https": True}
    return settings.model_copy(update={k: v for k, v in wider.items() if k not in settings.model_fields_set})


def _tell_unknown(name: str) -> str:
    if name in OF_A_WORKER:
        return f"{name}: is no setting: {OF_A_WORKER[name]}"
    if name in _OF_PARTS | _OF_GENERATION:
        return f"{name}: is no setting: give it to analyze, video, batch or stream"
    near = get_close_matches(name, Settings.model_fields, 1)
    return f"{name}: is no setting" + (f", did you mean {near[0]}?" if near else "")


def _part(given: Any, options: Mapping[str, Any]) -> Any:
    """A medium with options of a part."""
    if not options:
        return given
    if isinstance(given, Contract):
        given = given.model_dump(exclude_unset=True)
    return {**(given if isinstance(given, Mapping) else {"uri": given}), **options}


def _kind_of(options: Mapping[str, Any]) -> str:
    """The kind of medium that could have them."""
    return "image" if ImagePart.model_fields.keys() >= options.keys() & _OF_PARTS else "video"
