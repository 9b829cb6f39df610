"""A Celery worker whose engine echoes prompts: the queue, leases and settlement are real, and nothing is loaded.

For chaos tests and for measuring what the rest costs: `celery -A tests.support.echo_worker worker --pool threads`.
A prompt `wait 1.5` runs for as many seconds; of `write FILE` the first word at once, the rest when there is a
file; `raise MemoryError` raises it, `hang` hangs in its thread, `die` kills the process, `die FILE` once there is a
file. The device is lost once there is a file that ECHO_DEVICE_LOST names.
"""

import builtins
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from keye.config.outcome import ModelIdentity
from keye.config.settings import Settings
from keye.worker.daemon.bootsteps import EngineStep
from keye.worker.engine.inbox import FinishReason, Generated, Inbox, PendingGeneration
from keye.worker.engine.snapshot import EngineSnapshot
from keye.worker.host_fault import HostFault
from keye.worker.sizing import Sizing
from keye.worker.tasks.celery_app import build_app

if TYPE_CHECKING:
    from keye.worker.loading.served_model import ServedModel

CONTEXT_TOKENS = 8192
DEVICE_LOST = os.environ.get("ECHO_DEVICE_LOST")
# Generations that run at once; the others wait in the engine.
MAX_RUNNING = int(os.environ.get("ECHO_MAX_RUNNING", "1000"))
STEP_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class EchoPrompt:
    """What the engine and the attempt read of a prompt; a byte is a token."""

    text: str
    input_ids: bytes
    num_visual_tokens: int = 0


class EchoProcessor:
    """Reads the last message; media are not looked at."""

    config = SimpleNamespace(max_position_embeddings=CONTEXT_TOKENS)
    sizing = Sizing(factor=1, min_pixels=1, max_pixels=1)
    template_tokens = 0

    def count_text_tokens(self, messages: list[dict[str, Any]], thinking: str) -> int:
        return len(_last_text(messages))

    def prepare(self, messages: list[dict[str, Any]], images: Any, videos: Any, thinking: str) -> EchoPrompt:
        return self.prepare_text(messages, self.prepare_media(images, videos), thinking)

    def prepare_media(self, images: Any, videos: Any) -> Any:
        return SimpleNamespace(pixel_values=None, pixel_values_videos=None)

    def prepare_text(self, messages: list[dict[str, Any]], media: Any, thinking: str) -> EchoPrompt:
        text = _last_text(messages)
        match text.split():
            case ["raise", name]:
                raise getattr(builtins, name)
            case ["hang"]:
                threading.Event().wait()
        return EchoPrompt(text, text.encode())


def _last_text(messages: list[dict[str, Any]]) -> str:
    content: str | list[dict[str, str]] = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class EchoEngine:
    """One thread that ends each generation when its wait or its deadline is over or it is abandoned."""

    is_alive = True
    seconds_in_step = 0.0

    def __init__(self) -> None:
        self.inbox = Inbox(max_tokens=CONTEXT_TOKENS, is_queue=True)
        # And since when.
        self._running: dict[PendingGeneration, float] = {}
        self._waiting: list[PendingGeneration] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="echo-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self.inbox.wake()
        self._thread.join()

    def snapshot(self) -> EngineSnapshot:
        """A step of it reads any prompt, and nothing takes blocks."""
        return EngineSnapshot(
            running=len(self._running),
            max_running=MAX_RUNNING,
            waiting=len(self._waiting),
            max_step_tokens=CONTEXT_TOKENS,
        )

    def _run(self) -> None:
        while not self._is_stopping:
            if self._running or self._waiting:
                time.sleep(STEP_SECONDS)
            else:
                self.inbox.wait()
            self._waiting += self.inbox.drain()
            if DEVICE_LOST and os.path.exists(DEVICE_LOST):
                self.is_alive = False
                lost = HostFault("the device is lost", is_final=True)
                for pending in (*self._running, *self._waiting, *self.inbox.close(lost)):
                    pending.end(lost)
                return
            num_free = MAX_RUNNING - len(self._running)
            admitted = [p for place, p in enumerate(self._waiting) if place < num_free or p.is_abandoned]
            self._waiting = [p for p in self._waiting if p not in admitted]
            for pending in admitted:
                pending.begin()
                if beginning := _beginning(pending):
                    pending.deliver(beginning, 1)
            self._running |= dict.fromkeys(admitted, time.monotonic())
            self._running = {pending: since for pending, since in self._running.items() if not _step(pending, since)}


def _beginning(pending: PendingGeneration) -> str:
    return "write" if cast(EchoPrompt, pending.prompt).text.startswith("write ") else ""


def _step(pending: PendingGeneration, began_at: float) -> bool:
    """Whether it has ended."""
    prompt = cast(EchoPrompt, pending.prompt)
    beginning = _beginning(pending)
    match prompt.text.split():
        case ["die", *files]:
            is_over = False
            if all(map(os.path.exists, files)):
                os.kill(os.getpid(), signal.SIGKILL)
        case ["wait", seconds]:
            is_over = time.monotonic() >= began_at + float(seconds)
        case ["write", file]:
            is_over = Path(file).exists()
        case _:
            is_over = True
    reason: FinishReason = "stop"
    if is_over:
        pending.deliver(prompt.text.removeprefix(beginning), len(prompt.input_ids))
    elif pending.is_abandoned:
        reason = "abandoned"
    elif time.monotonic() >= pending.deadline:
        reason = "deadline"
    else:
        return False
    waited = time.monotonic() - pending.submitted_at
    pending.end(
        Generated(
            text=prompt.text if is_over else beginning,
            token_ids=tuple(prompt.input_ids) if is_over else (),
            finish_reason=reason,
            num_prompt_tokens=len(prompt.input_ids),
            queued_seconds=0.0,
            first_token_seconds=waited if is_over else None,
            generate_seconds=waited,
        )
    )
    return True


class EchoStep(EngineStep):
    def load(self, settings: Settings) -> "ServedModel":
        return serve(EchoProcessor())


def serve(processor: EchoProcessor) -> "ServedModel":
    engine = EchoEngine()
    engine.start()
    model = ModelIdentity(name="echo", model_type="echo", precision="float32")
    rest = {"processor": processor, "sampling": {}, "model": model, "device": "none", "warnings": ()}
    return cast("ServedModel", SimpleNamespace(engine=engine, **rest))


celery_app = build_app(Settings())
celery_app.steps["worker"].add(EchoStep)
