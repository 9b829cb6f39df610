"""What `import keye.producer` offers, and what it costs."""

import os
import subprocess
import sys

import pytest

from keye import producer

# SQLite is not in every Python.
HEAVY = {"torch", "transformers", "numpy", "PIL", "av", "boto3", "worker", "typer", "rich", "sqlite3"}


def test_every_exported_name_is_there_and_the_list_is_sorted() -> None:
    assert producer.__all__ == sorted(producer.__all__)
    assert all(hasattr(producer, name) for name in producer.__all__)


def test_the_public_surface_is_exactly_this() -> None:
    assert " ".join(producer.__all__) == (
        "AnalysisJob Answer AnswerEnded AsyncBatch AsyncClient AsyncJob Batch BatchProgress Cancellation "
        "ChatMessage Client Content DeadLetterNotFound End EndedJob ErrorCode EventsMissing FeedGap FramesDecoded "
        "GenerationOptions Heartbeat IdempotencyConflict ImagePart InvalidBatch InvalidEventId InvalidJob "
        "InvalidSettings Job JobEnded JobEvent JobFailed JobFailure JobNotEnded JobNotFound JobResult JobState "
        "JobUnreadable KeyeError MessageNotFound OutputUnwritable PartialText Priority Progress Question "
        "QueueFull QueueUnavailable QueuedAgain Refusal Sampling Settings Stage StageStarted TextGenerated "
        "TextPart Thinking TokenLogprob Unanswered UnknownSchemaVersion UploadFailed VideoPart"
    )


def test_importing_the_producer_loads_nothing_heavy() -> None:
    listing = (
        "import sys, keye; keye.Client; print(*{name.removeprefix('keye.').partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert "producer" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_settings_are_read_where_the_system_does_not_tell_its_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on macOS and Windows, where producers run too.
    monkeypatch.delattr(os, "sched_getaffinity")
    assert 1 <= producer.Settings().decoders <= 8
