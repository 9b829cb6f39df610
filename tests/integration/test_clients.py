"""One suite for all clients: in threads and in asyncio, on a real server and in memory."""

from collections.abc import Callable
from typing import Any

import pytest

from keye.config.codes import ErrorCode, JobState, Stage
from keye.producer import (
    Cancellation,
    Heartbeat,
    InvalidEventId,
    InvalidJob,
    JobEnded,
    JobFailed,
    JobFailure,
    JobNotEnded,
    JobNotFound,
    JobResult,
    QueueFull,
    QueueUnavailable,
    Refusal,
    StageStarted,
    TextGenerated,
)
from tests.integration.conftest import MAX_QUEUE_DEPTH, Pair
from tests.support.conditions import eventually


class TestOneJob:
    def test_a_submitted_job_is_found_by_its_id_and_unknown_ones_are_not(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        assert pair.client.find(job.id).state is JobState.QUEUED
        with pytest.raises(JobNotFound, match="nobody"):
            pair.client.find("nobody")

    @pytest.mark.holds(
        "docs/test-without-a-gpu.md#how-do-i-test-my-code-without-a-gpu",
        "It needs no Redis, no worker and no checkpoint",
    )
    def test_what_fits_no_job_is_refused_with_every_fault(self, pair: Pair) -> None:
        with pytest.raises(InvalidJob, match=r"2 faults: .*prompt.*thinking"):
            pair.client.submit(prompt="", thinking="hard")

    @pytest.mark.holds("docs/producers.md#from-python", "`result` hears of the end at once")
    @pytest.mark.holds("docs/design.md#decisions", "holds all four")
    def test_who_waits_gets_the_result_when_the_job_ends(self, pair: Pair, meanwhile: Callable[..., Any]) -> None:
        job = pair.client.submit(prompt="?")
        waiting = meanwhile(job.result, 30)
        pair.worker.start(job)
        pair.worker.answer(job, "a red square")
        assert waiting.result(10).answer == "a red square"
        assert (job.state, job.result(timeout=0).answer) == (JobState.SUCCEEDED, "a red square")

    @pytest.mark.holds("docs/producers.md#what-can-be-raised", "the job ended without an answer")
    def test_a_failed_job_raises_its_typed_failure(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        pair.worker.fail(job, ErrorCode.MEDIA_CORRUPT, "It is damaged.")
        with pytest.raises(JobFailed, match="MEDIA_CORRUPT: It is damaged") as failed:
            job.result(timeout=5)
        assert failed.value.failure.job_id == job.id
        assert job.state is JobState.FAILED

    @pytest.mark.holds("docs/producers.md#what-can-be-raised", "`timeout` seconds were not enough")
    @pytest.mark.holds("docs/producers.md#from-python", "Its `timeout` ends the wait, never the job")
    @pytest.mark.parametrize("is_running", [False, True])
    def test_a_wait_that_ends_first_says_the_state(self, pair: Pair, is_running: bool) -> None:
        job = pair.client.submit(prompt="?")
        if is_running:
            pair.worker.start(job)
        expected = "is RUNNING after 0.1 s.*wait again" if is_running else "is QUEUED after 0.1 s.*worker running"
        with pytest.raises(JobNotEnded, match=expected):
            job.result(timeout=0.1)
        with pytest.raises(TimeoutError):
            list(job.events(timeout=0))

    def test_a_job_that_is_gone_is_not_found_by_who_waits(self, pair: Pair, meanwhile: Callable[..., Any]) -> None:
        job = pair.client.submit(prompt="?")
        waiting = meanwhile(job.result, 30)
        events = meanwhile(list, job.events(30))
        pair.worker.forget(job)
        for each in (waiting, events):
            with pytest.raises(JobNotFound):
                each.result(20)
        with pytest.raises(JobNotFound):
            job.cancel()
        with pytest.raises(JobNotFound):
            job.progress  # noqa: B018

    @pytest.mark.holds("docs/producers.md#from-python", "`cancel` ends a queued job at once.")
    def test_cancelling_depends_on_how_far_the_job_is(self, pair: Pair, meanwhile: Callable[..., Any]) -> None:
        queued, running, ended = (pair.client.submit(prompt="?") for _ in range(3))
        pair.worker.start(running)
        pair.worker.answer(ended, "yes")
        waiting = meanwhile(queued.result, 30)
        told = [job.cancel() for job in (queued, running, ended, queued)]
        assert told == [
            Cancellation.CANCELLED,
            Cancellation.REQUESTED,
            Cancellation.ALREADY_ENDED,
            Cancellation.CANCELLED,
        ]
        with pytest.raises(JobFailed, match="CANCELLED"):
            waiting.result(10)
        assert (running.state, ended.result(5).answer) == (JobState.RUNNING, "yes")

    def test_closing_the_client_is_told_to_who_waits(self, pair: Pair, meanwhile: Callable[..., Any]) -> None:
        events = pair.client.submit(prompt="?").events(heartbeat_seconds=0.01)
        assert isinstance(next(events), Heartbeat)
        following = meanwhile(list, events)
        pair.client.close()
        with pytest.raises(QueueUnavailable, match="closed"):
            following.result(20)


class TestEvents:
    @pytest.mark.holds(
        "docs/producers.md#while-it-runs",
        "`job.events()` gives everything the worker said",
        "It can be read any number of times",
    )
    def test_they_tell_the_job_from_its_start_to_its_end_to_early_and_late_readers(
        self, pair: Pair, meanwhile: Callable[..., Any]
    ) -> None:
        job = pair.client.submit(prompt="?")
        early = meanwhile(list, job.events(30))
        pair.worker.start(job)
        for text in ("a ", "red ", "square"):
            pair.worker.write(job, text)
        pair.worker.answer(job)
        heard, late = early.result(20), list(job.events(timeout=5))
        assert [event.id for event in heard] == [event.id for event in late]
        assert "".join(event.text for event in late if isinstance(event, TextGenerated)) == "a red square"
        assert isinstance(late[-1], JobEnded)

    @pytest.mark.holds("docs/producers.md#while-it-runs", "`event.id` is where an event stands on the stream")
    def test_a_reader_goes_on_behind_the_event_he_saw_last(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        pair.worker.start(job)
        pair.worker.write(job, "one ")
        pair.worker.write(job, "two")
        pair.worker.answer(job)
        events = list(job.events(timeout=5))
        for index, event in enumerate(events):
            assert [each.id for each in job.events(timeout=5, after=event.id)] == [
                each.id for each in events[index + 1 :]
            ]

    @pytest.mark.holds("docs/producers.md#what-can-be-raised", "what was given as `after` is no id of an event")
    @pytest.mark.holds("docs/producers.md#while-it-runs", "what is none raises `InvalidEventId`")
    @pytest.mark.parametrize("after", ["", "$", "1-0-0", "-1", "newest", "1" * 30, "\u0661-0", "0-0\n"])
    def test_an_id_that_is_none_is_refused(self, pair: Pair, after: str) -> None:
        job = pair.client.submit(prompt="?")
        with pytest.raises(InvalidEventId, match="no id of an event"):
            list(job.events(timeout=0, after=after))
        with pytest.raises(InvalidEventId):
            list(pair.client.watch(after=after, timeout=0))

    @pytest.mark.holds("docs/producers.md#while-it-runs", "the next one starts the text again")
    def test_text_begins_anew_with_the_next_attempt(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        pair.worker.start(job)
        pair.worker.write(job, "a re")
        pair.worker.lose(job)
        pair.worker.start(job)
        pair.worker.answer(job, "a red square")
        told = [event for event in job.events(timeout=5) if isinstance(event, TextGenerated | StageStarted)]
        assert [(e.attempt, getattr(e, "text", None)) for e in told if isinstance(e, TextGenerated)] == [
            (1, "a re"),
            (2, "a red square"),
        ]
        assert Stage.QUEUED in [event.stage for event in told if isinstance(event, StageStarted)]

    @pytest.mark.holds("docs/producers.md#while-it-runs", "With `heartbeat_seconds=15` a `Heartbeat` comes")
    @pytest.mark.holds("docs/stream-to-a-browser.md#and-without-fastapi", "`heartbeat_seconds` has `events` give")
    def test_heartbeats_come_while_nothing_is_said_and_end_with_the_job(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        events = job.events(timeout=30, heartbeat_seconds=0.05)
        assert [type(next(events)) for _ in range(3)] == [Heartbeat] * 3
        pair.worker.answer(job, "yes")
        kinds = [type(event) for event in events if not isinstance(event, Heartbeat)]
        assert kinds[-1] is JobEnded

    def test_a_long_story_reaches_a_reader_who_comes_late_and_is_slow(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        for number in range(400):
            pair.worker.write(job, f"{number} ")
        events = job.events(timeout=30)
        heard = [next(events)]
        pair.worker.answer(job)
        heard += events
        text = "".join(event.text for event in heard if isinstance(event, TextGenerated))
        assert text.split() == [str(number) for number in range(400)]


class TestMany:
    @pytest.mark.holds(
        "docs/producers.md#many-jobs",
        "`results` takes jobs, the refusals among them",
        "Each comes once, whatever became of it",
    )
    @pytest.mark.holds("docs/keep-my-own-table.md#and-if-only-one-process-sends-jobs", "Then it needs no feed")
    @pytest.mark.holds("docs/collect-many-results.md#after-a-restart", "`results` takes ids as well as jobs")
    @pytest.mark.holds(
        "docs/collect-many-results.md#how-do-i-collect-many-results", "`results` gives each job once", "end | means"
    )
    def test_results_gives_each_job_once_as_it_ends_whatever_came_of_it(
        self, pair: Pair, meanwhile: Callable[..., Any]
    ) -> None:
        good, bad, never, same = pair.client.submit_many(
            [{"prompt": "?"}, {"prompt": "?"}, {"prompt": "?"}, {"prompt": ""}]
        )
        pair.worker.answer(good, "yes")
        given = [never, good, bad, same, "nobody", good.id]
        collecting = meanwhile(lambda: list(pair.client.results(given, timeout=3)))
        pair.worker.fail(bad, ErrorCode.INTERNAL)
        pairs = collecting.result(20)
        ends = {(job if isinstance(job, Refusal) else job.id): type(end) for job, end in pairs}
        assert len(pairs) == len(given)
        assert ends == {
            same: InvalidJob,
            good.id: JobResult,
            bad.id: JobFailure,
            "nobody": JobNotFound,
            never.id: JobNotEnded,
        }

    def test_results_of_nothing_is_nothing(self, pair: Pair) -> None:
        assert list(pair.client.results([])) == []

    @pytest.mark.holds(
        "docs/collect-many-results.md#in-the-order-of-my-list-and-without-holding-all-of-it",
        "A full queue is waited for.",
    )
    @pytest.mark.holds(
        "docs/operations.md#how-do-i-keep-a-backlog-from-growing-without-end",
        "`client.map` waits by itself",
    )
    def test_map_answers_in_the_order_of_the_media_however_full_the_queue_is(
        self, pair: Pair, meanwhile: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("keye.producer.transport.RETRY_AFTER_SECONDS", 0.1)
        media = [f"s3://photos/{number}.jpg" for number in range(2 * MAX_QUEUE_DEPTH)]
        mapping = meanwhile(lambda: list(pair.client.map("?", [*media, "no medium"], thinking="no_think")))
        while not mapping.done():
            for job in reversed(pair.worker.jobs):
                if pair.client.find(job.id).state is JobState.QUEUED:
                    pair.worker.answer(job, pair.worker.asked(job).media[0].uri)
        *ends, last = mapping.result()
        assert [end.answer for end in ends] == media
        assert isinstance(last, InvalidJob)

    @pytest.mark.parametrize("media", ["s3://photos/cat.jpg", b"...", {"type": "image", "uri": "/cat.jpg"}])
    def test_map_wants_many_media(self, pair: Pair, media: Any) -> None:
        with pytest.raises(TypeError, match="give a list"):
            list(pair.client.map("?", media))

    @pytest.mark.holds(
        "docs/producers.md#what-can-be-raised", "as many jobs are queued as `KEYE_MAX_QUEUE_DEPTH` allows"
    )
    @pytest.mark.holds("docs/alerts.md#keyedraintoolong", "have producers refused by `KEYE_MAX_QUEUE_DEPTH`")
    @pytest.mark.holds(
        "docs/operations.md#how-do-i-keep-a-backlog-from-growing-without-end",
        "new ones are refused as `QueueFull`",
        "A job whose idempotency key is known is found all the same",
    )
    def test_a_full_queue_refuses_new_jobs_says_when_to_come_again_and_takes_known_ones(self, pair: Pair) -> None:
        jobs = [pair.client.submit(prompt="?", idempotency_key=str(number)) for number in range(MAX_QUEUE_DEPTH)]
        with pytest.raises(
            QueueFull, match=rf"{MAX_QUEUE_DEPTH} jobs are queued, the limit is {MAX_QUEUE_DEPTH}"
        ) as full:
            pair.client.submit(prompt="?")
        assert full.value.retry_after_seconds >= 1
        assert pair.client.submit(prompt="?", idempotency_key="3").id == jobs[3].id
        jobs[0].cancel()
        pair.worker.start(jobs[1])
        taken = pair.client.submit_many([{"prompt": "?"}] * 3)
        assert [isinstance(each, QueueFull) for each in taken] == [False, False, True]

    def test_the_feed_tells_all_that_end_and_goes_on_where_it_was_left(
        self, pair: Pair, meanwhile: Callable[..., Any]
    ) -> None:
        first, second, third = (pair.client.submit(prompt="?") for _ in range(3))
        pair.worker.answer(first, "yes")
        (told,) = pair.client.watch(after="0", timeout=0)
        assert (told.job_id, told.state) == (first.id, JobState.SUCCEEDED)
        assert list(pair.client.watch(after=told.id, timeout=0)) == []
        feed = pair.client.watch(after=told.id, timeout=30)
        following = meanwhile(next, feed)
        second.cancel()
        assert (following.result(20).job_id, second.state) == (second.id, JobState.CANCELLED)
        pair.worker.fail(third, ErrorCode.INTERNAL)
        assert [(each.job_id, each.state) for each in pair.client.watch(after=told.id, timeout=0)] == [
            (second.id, JobState.CANCELLED),
            (third.id, JobState.FAILED),
        ]
        assert list(pair.client.watch(timeout=0)) == []


class TestProgress:
    def test_a_queued_job_has_a_place_behind_those_that_go_first(self, pair: Pair) -> None:
        low, normal = (pair.client.submit(prompt="?", priority=priority) for priority in ("low", "normal"))
        high, later = (pair.client.submit(prompt="?", priority=priority) for priority in ("high", "normal"))
        assert [job.progress.place for job in (high, normal, later, low)] == [0, 1, 2, 3]
        assert (low.progress.state, low.progress.stage, low.progress.attempt) == (JobState.QUEUED, Stage.QUEUED, 0)

    @pytest.mark.holds("docs/producers.md#while-it-runs", "`job.progress` is one look")
    def test_a_running_job_tells_its_stage_its_frames_and_its_tokens(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        pair.worker.start(job, Stage.DECODE)
        for index, done in ((0, 1), (1, 2), (0, 3)):
            pair.worker.decode(job, done, 4, index)
        told = job.progress
        assert (told.state, told.stage, told.place) == (JobState.RUNNING, Stage.DECODE, None)
        assert (told.attempt, told.frames_done, told.frames_total, told.num_tokens) == (1, 5, 8, 0)
        pair.worker.start(job, Stage.GENERATE)
        pair.worker.write(job, "a red ")
        pair.worker.write(job, "square")
        told = job.progress
        assert (told.stage, told.frames_done, told.num_tokens) == (Stage.GENERATE, 5, 3)
        pair.worker.answer(job)
        assert (job.progress.state, job.progress.stage, job.progress.seconds_left) == (JobState.SUCCEEDED, None, 0)

    def test_another_attempt_begins_with_nothing(self, pair: Pair) -> None:
        job = pair.client.submit(prompt="?")
        pair.worker.start(job)
        pair.worker.decode(job, 3, 4)
        pair.worker.write(job, "a red")
        pair.worker.lose(job)
        pair.worker.start(job, Stage.FETCH)
        told = job.progress
        assert (told.stage, told.attempt, told.frames_done, told.num_tokens) == (Stage.FETCH, 2, None, 0)


def test_many_follow_one_job_and_each_hears_all(pair: Pair, meanwhile: Callable[..., Any]) -> None:
    job = pair.client.submit(prompt="?")
    pair.worker.write(job, "a ")
    begun = [job.events(30) for _ in range(3)]
    firsts = [next(events) for events in begun]
    following = [meanwhile(list, events) for events in begun]
    pair.worker.answer(job)
    eventually(lambda: all(each.done() for each in following))
    heard = [[first.id, *(event.id for event in each.result())] for first, each in zip(firsts, following, strict=True)]
    assert heard == [[event.id for event in job.events()]] * 3
