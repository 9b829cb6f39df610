"""What the caller reads for each thing that can be raised under a job."""

import pytest

from keye.config.outcome import ErrorCode
from keye.worker.engine.inbox import GenerationFault, TooLongForEngine
from keye.worker.media.job_media import MediaFault
from keye.worker.model.image_processing import UnusableImage
from keye.worker.tasks.fault import JobFault, explain


def media_fault() -> MediaFault:
    fault = MediaFault(ErrorCode.MEDIA_CORRUPT, "a.jpg: is damaged.")
    fault.media_index = 2
    return fault


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (JobFault(ErrorCode.CANCELLED, "as asked"), ErrorCode.CANCELLED, "as asked"),
        (media_fault(), ErrorCode.MEDIA_CORRUPT, "a.jpg"),
        (GenerationFault(ErrorCode.OUT_OF_MEMORY, "too large"), ErrorCode.OUT_OF_MEMORY, "too large"),
        (TooLongForEngine(9000, 4096), ErrorCode.PROMPT_TOO_LONG, "9000"),
        (UnusableImage("aspect ratio 300"), ErrorCode.MEDIA_UNSUPPORTED, "aspect ratio 300"),
        (KeyError("x"), ErrorCode.INTERNAL, "KeyError"),
        (SystemExit(3), ErrorCode.INTERNAL, "SystemExit"),
    ],
)
def test_each_kind_has_its_code_and_says_what_happened(raised: BaseException, code: ErrorCode, words: str) -> None:
    fault = explain(raised)
    assert fault.code is code
    assert words in fault.message


def test_medium_to_blame_is_kept() -> None:
    assert explain(media_fault()).media_index == 2


def test_text_of_an_unexpected_error_is_not_told_to_the_caller() -> None:
    assert "s3cret" not in explain(RuntimeError("https://host/?signature=s3cret")).message
