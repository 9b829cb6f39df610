"""How many jobs go in one round trip."""

from keye.config.faults import InvalidJob, Refusal
from keye.config.job import AnalysisJob, ImagePart
from keye.config.wire import SealedJob, seal
from keye.producer.many import CHARS_PER_ROUND_TRIP, batches

PHOTO = ImagePart(uri="data:image/png;base64,".ljust(2**20, "A"))


def sizes(jobs: list[SealedJob | Refusal], **options: int) -> list[int]:
    given = list(batches(jobs, **options))
    assert [job for batch in given for job in batch] == jobs
    return [len(batch) for batch in given]


def test_jobs_go_by_the_hundred_and_refusals_with_them() -> None:
    jobs: list[SealedJob | Refusal] = [seal(AnalysisJob(prompt="?")) for _ in range(300)]
    assert sizes([InvalidJob("?"), *jobs]) == [250, 51]
    assert sizes([]) == []


def test_first_batches_are_small_where_jobs_come_slowly() -> None:
    assert sizes([seal(AnalysisJob(prompt="?"))] * 600, first=1) == [1, 2, 4, 8, 16, 32, 64, 128, 250, 95]


def test_pictures_inside_jobs_make_batches_smaller() -> None:
    one = seal(AnalysisJob(prompt="?", media=(PHOTO,) * 3))
    num_in_batch = CHARS_PER_ROUND_TRIP // (3 * 2**20) + 1
    assert sizes([one] * 2 * num_in_batch) == [num_in_batch] * 2
