"""Records as lines, and lines that nobody can read: real pipes, and a disk that is really full."""

import fcntl
import json
import logging
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from keye.config.faults import InvalidSettings
from keye.config.settings import Settings
from keye.worker.telemetry.log import MAX_WAITING_LINES, JsonLines, LogStream, TextLines, about
from keye.worker.telemetry.redaction import redaction
from tests.support.conditions import eventually

PASSWORD = "Hush7Hush"
TRACEPARENT = f"00-{'4b' * 16}-{'0f' * 8}-01"
REDACT = redaction(Settings(redis_password=SecretStr(PASSWORD)))


def logger_to(descriptor: int, lines: logging.Formatter) -> tuple[logging.Logger, LogStream]:
    stream = LogStream(descriptor)
    stream.setFormatter(lines)
    logger = logging.Logger("keye.worker.test")
    logger.addHandler(stream)
    return logger, stream


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    yield descriptor, path
    os.close(descriptor)


def tell_all(logger: logging.Logger) -> None:
    with about(job_id="1", attempt=2, traceparent=TRACEPARENT):
        logger.info("job %s: fetched\u2028again", "1", extra={"state": "RUNNING", "stage": "fetch"})
        try:
            raise ConnectionError(f"AUTH {PASSWORD}: no")
        except ConnectionError:
            logger.exception("cannot reach %s", f"redis://me:{PASSWORD}@cache", extra={"of": {"password": PASSWORD}})
    logger.warning("between jobs")


def test_json_is_an_object_a_line_with_the_facts_of_the_job_and_no_secret(file: tuple[int, Path]) -> None:
    descriptor, path = file
    logger, stream = logger_to(descriptor, JsonLines("gpu0", REDACT))
    tell_all(logger)
    stream.flush()
    assert PASSWORD not in path.read_text()
    moved, failed, between = (json.loads(line) for line in path.read_text().splitlines())
    assert moved.pop("time").endswith("+00:00")
    assert moved == {
        "level": "INFO",
        "logger": "keye.worker.test",
        "message": "job 1: fetched\u2028again",
        "worker": "gpu0",
        "state": "RUNNING",
        "stage": "fetch",
        "job_id": "1",
        "attempt": 2,
        "traceparent": TRACEPARENT,
    }
    assert failed["message"] == "cannot reach redis://***@cache"
    assert failed["exc_info"].endswith("ConnectionError: AUTH ***: no")
    assert failed["of"] == "{'password': ***}"
    assert "job_id" not in between


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError(PASSWORD)


@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "A text of more than 32,000 characters")
@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("cut \ud800 off", "cut \ud800 off"),
        ("two\r\nlines\x00", "two\r\nlines\x00"),
        (b"\xff", "b'\\xff'"),
        ("x" * 10**6, f"{'x' * 16_000}... (968000 characters) ...{'x' * 16_000}"),
    ],
)
def test_whatever_is_told_is_one_object_on_one_line(odd: object, told: str, file: tuple[int, Path]) -> None:
    descriptor, path = file
    logger, stream = logger_to(descriptor, JsonLines("gpu0", REDACT))
    logger.info("odd", extra={"odd": odd})
    stream.flush()
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["odd"] == told


@pytest.mark.parametrize("lines", [JsonLines, TextLines])
def test_what_cannot_be_told_is_told_by_its_place(
    lines: type[JsonLines] | type[TextLines], file: tuple[int, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    descriptor, path = file
    logger, stream = logger_to(descriptor, lines("gpu0", REDACT))
    with about(job_id="1", traceparent=TRACEPARENT):
        logger.error("it is %s", Unspeakable(), extra={"of": Unspeakable()})
        logger.error("of %d", "them")
    stream.flush()
    first, second = path.read_text().splitlines()
    assert f"{Path(__file__).name}:" in first
    assert "logs what raises RuntimeError" in first
    assert "logs what raises TypeError" in second
    assert TRACEPARENT in first
    assert PASSWORD not in first
    assert capfd.readouterr() == ("", "")


@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "text shows the latter in brackets")
def test_text_is_for_people_and_names_the_trace(file: tuple[int, Path]) -> None:
    descriptor, path = file
    logger, stream = logger_to(descriptor, TextLines("gpu0", REDACT))
    tell_all(logger)
    stream.flush()
    assert PASSWORD not in path.read_text()
    lines = path.read_text().splitlines()
    assert lines[0].endswith(": INFO/gpu0] job 1: fetched")
    assert lines[1] == f"again ({TRACEPARENT})"
    assert "ERROR/gpu0] cannot reach redis://***@cache" in lines[2]
    assert lines[-2:][0] == "ConnectionError: AUTH ***: no"
    assert lines[-1].endswith(": WARNING/gpu0] between jobs")


def test_what_others_break_or_colour_is_told_from_a_line_of_ours(file: tuple[int, Path]) -> None:
    descriptor, path = file
    logger, stream = logger_to(descriptor, TextLines("gpu0", REDACT))
    forged = "x\x1b[2J\x9b2J\r\n[2026-11-27 00:00:00,000: INFO/gpu0] all is well\u202e"
    logger.warning("job %s: failed", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("worse")
    stream.flush()
    text = path.read_bytes().decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count("\\u001b[2J\\u009b2J\\u000d") == 2
    assert [line.partition("] ")[2] for line in text.split("\n") if line.startswith("[")] == [
        "job x\\u001b[2J\\u009b2J\\u000d",
        "worse",
    ]


@pytest.mark.holds(
    "docs/alerts.md#keyeloglinesdropped",
    "whoever reads stderr is gone or too slow",
    "the workers then go on writing by themselves",
    "What is lost stays lost.",
)
@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "up to 5,000 lines wait, and further ones are dropped and counted",
)
def test_lines_that_nobody_reads_are_dropped_and_counted_and_whole_ones_go_on_once_somebody_does() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    logger, stream = logger_to(writer, TextLines("cpu", REDACT))
    sent = 2 * MAX_WAITING_LINES
    for number in range(sent):
        logger.info("line %d", number)
    dropped = stream.num_dropped
    assert sent - MAX_WAITING_LINES - 4096 < dropped <= MAX_WAITING_LINES
    with os.fdopen(reader) as lines:
        read = [int(lines.readline().partition("] line ")[2]) for _ in range(sent - dropped)]
        assert read == sorted(read)
        logger.info("somebody reads")
        assert lines.readline().endswith("somebody reads\n")
    assert stream.num_dropped == dropped
    # Nobody does any more, for good.
    logger.info("to nobody")
    eventually(lambda: stream.num_dropped == dropped + 1)
    os.close(writer)


@pytest.mark.holds("docs/alerts.md#keyeloglinesdropped", "The disk that the log goes to is full (`df`)")
def test_a_full_disk_costs_its_lines_and_nothing_else() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    logger, stream = logger_to(full, TextLines("cpu", REDACT))
    for _ in range(3):
        logger.info("no room")
    stream.flush()
    assert stream.num_dropped == 3
    os.close(full)


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "A line that broke off for want of room is half an object",
)
def test_a_line_that_broke_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "log")
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    logger, stream = logger_to(writer, JsonLines("cpu", REDACT))
    logger.info("x" * 10_000)
    eventually(lambda: is_full(writer))
    os.close(first)
    eventually(lambda: stream.num_dropped == 1)
    with path.open() as second:
        assert len(os.read(second.fileno(), 4096)) == 4096
        logger.info("whole")
        assert second.readline() == "\n"
        assert json.loads(second.readline())["message"] == "whole"
    os.close(writer)


def test_where_the_reader_is_slow_lines_wait_also_on_a_pipe_that_does_not() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    logger, stream = logger_to(writer, TextLines("cpu", REDACT))
    for number in range(1000):
        logger.info("line %d", number)
    eventually(lambda: is_full(writer))
    with os.fdopen(reader) as lines:
        assert [int(lines.readline().partition("] line ")[2]) for _ in range(1000)] == list(range(1000))
    assert stream.num_dropped == 0
    os.close(writer)


def is_full(pipe: int) -> bool:
    return not select.select([], [pipe], [], 0)[1]


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "1 is a fault nobody foresaw (there is a traceback)")
def test_the_fault_that_ends_a_process_is_its_last_record() -> None:
    program = f"""
from keye.config.settings import Settings
from keye.worker.telemetry.log import set_up_log

set_up_log(Settings(log_format="json"), "supervisor", "INFO")
raise ConnectionError("redis://me:{PASSWORD}@cache")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    record = json.loads(ended.stderr)
    assert (record["level"], record["worker"]) == ("CRITICAL", "supervisor")
    assert record["exc_info"].endswith("ConnectionError: redis://***@cache")


def test_a_wrong_format_or_level_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_LOG_FORMAT", "xml")
    monkeypatch.setenv("KEYE_LOG_LEVEL", "loud")
    with pytest.raises(InvalidSettings) as refused:
        Settings.read()
    assert "KEYE_LOG_FORMAT: Input should be 'text' or 'json'; KEYE_LOG_LEVEL: Input should be 'DEBUG'" in str(
        refused.value
    )
    monkeypatch.setenv("KEYE_LOG_FORMAT", "json")
    monkeypatch.setenv("KEYE_LOG_LEVEL", "warning")
    assert Settings.read().log_level == "WARNING"
