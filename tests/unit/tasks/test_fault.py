"""What the caller reads for each thing that can be raised under a job."""

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.tasks.fault import explain


@pytest.mark.parametrize("raised", [KeyError("x"), SystemExit(3)])
def test_an_unexpected_error_is_told_by_its_kind(raised: BaseException) -> None:
    fault = explain(raised)
    assert fault.code is ErrorCode.INTERNAL
    assert type(raised).__name__ in fault.message


def test_a_fault_is_told_as_it_is() -> None:
    with pytest.raises(Fault) as raised:
        raise Fault(ErrorCode.MEDIA_CORRUPT, "a.jpg: is damaged.", media_index=2)
    fault = explain(raised.value)
    assert (fault.code, fault.message, fault.media_index) == (ErrorCode.MEDIA_CORRUPT, "a.jpg: is damaged.", 2)
    assert str(fault) == "a.jpg: is damaged."
    assert fault.__traceback__ is None, "what the attempt held would live on"


def test_text_of_an_unexpected_error_is_not_told_to_the_caller() -> None:
    assert "s3cret" not in explain(RuntimeError("https://host/?signature=s3cret")).message
