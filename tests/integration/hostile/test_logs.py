"""The log of a worker that has met everything here: no body, no line that is not its own, and none without an end."""

import json
from uuid import uuid4

import pytest

from keye.config.codes import ErrorCode
from tests.integration.hostile.broadcasts import BROADCASTS
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.errands import ALLOWED, EMBEDDED, GROUPED, TASKS, UNCALLABLE
from tests.integration.hostile.messages import (
    ABSENT,
    FORGED,
    NAN,
    SECRET,
    SIGNED,
    as_body,
    command,
    errand,
    message,
    nested,
    sealed_job,
)
from tests.integration.hostile.unreadable import TOLD, UNTOLD

SETTINGS = {"KEYE_CELERY_CANVAS": ALLOWED}
MAX_LINE_CHARS = 2000
LINE_BREAK = f"a\n{FORGED}\r\n{FORGED}\x1b[31m\u2028{FORGED}\x85{FORGED}"
UNPRINTABLE = "\U000e0001" * 1000


def broken_jobs() -> list[bytes]:
    """What a job's own faults may quote."""
    faults = [
        {"media": [{"type": "image", "uri": SIGNED.replace("https", "ftp")}]},
        {"media": [{"type": SIGNED, "uri": "/cat.jpg"}]},
        {"media": [{"type": "image", "uri": SIGNED * 1000}]},
        {"media": [SIGNED], "prompt": 7},
        {"media": [{"type": "image", "uri": SIGNED, "token": SECRET}]},
        {"prompt": SIGNED, "messages": SIGNED},
        {"prompt": ABSENT, "messages": [{"role": SIGNED, "content": SIGNED}]},
        {"priority": SIGNED, "thinking": SIGNED, "idempotency_key": SIGNED * 10, "deadline_seconds": SIGNED},
        {"metadata": {SIGNED: NAN, LINE_BREAK: "\ud83d"}},
        {"metadata": {"a": SIGNED * 1000}},
        {"metadata": json.loads(nested(300))},
        {LINE_BREAK: 1, UNPRINTABLE: 2, "a" * 10**6: 3},
        {"generation": {"stop": ["", "\ud83d", SIGNED], "seed": SIGNED, LINE_BREAK: SIGNED}},
        {f"k{i}": SIGNED for i in range(1000)},
    ]
    jobs = [message(job_id, sealed=sealed_job(job_id, **fields)) for fields in faults if (job_id := str(uuid4()))]
    jobs += [message(job_id, sealed=sealed) for sealed in (SIGNED, [SIGNED], 7) if (job_id := str(uuid4()))]
    return jobs


def forging_messages() -> list[bytes]:
    """A line break wherever a name may stand."""
    names = ("task", "id", "lang", "eta", "expires", "group", "root_id", "parent_id", "shadow", "origin", "argsrepr")
    raws = [message(str(uuid4()), {f"headers.{name}": text}) for name in names for text in (LINE_BREAK, UNPRINTABLE)]
    for text in (LINE_BREAK, UNPRINTABLE):
        raws += [
            message(text),
            message(str(uuid4()), sealed=sealed_job(text)),
            message(str(uuid4()), {"properties.delivery_tag": text, "properties.correlation_id": text}),
            message(str(uuid4()), {"properties.delivery_info": {"exchange": text, "routing_key": text}}),
            message(str(uuid4()), {"content-type": text, "content-encoding": text, f"{text[:5]}": text}),
            message(str(uuid4()), {"headers.compression": text}),
            message(str(uuid4()), {"headers.stamped_headers": [text], "headers.stamps": {text: [SIGNED]}}),
            message(str(uuid4()), embedded={"callbacks": [errand(text, text)]}),
            message(str(uuid4()), embedded={"callbacks": [errand("reports", "report.done", options={text: SIGNED})]}),
            message(str(uuid4()), embedded={"callbacks": [errand("reports", f"report.{text}")]}),
            message(str(uuid4()), embedded={"callbacks": [errand("reports", "report.done", subtask_type=text)]}),
            message(str(uuid4()), kwargs={text: SIGNED}),
            message(str(uuid4()), kwargs={"written": json.dumps({"sealed": None, "asked": {"refused": text * 100}})}),
            message(str(uuid4()), {"headers": {}, "body": as_body({"task": text, "id": text, "kwargs": {"job": {}}})}),
            command(text, arguments={text: SIGNED}),
            command("ping", destination=[text], pattern=text, matcher=text),
            command("ping", reply_to={"exchange": text, "routing_key": text}, ticket=text),
            command("revoke", arguments={"task_id": text}),
        ]
    return raws


@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "no query of a URL is logged")
def test_a_worker_that_has_met_all_of_it_tells_of_it_in_lines_of_its_own(host: EchoHost) -> None:
    raws = [
        *(message(str(uuid4()), changes) for changes, _ in TOLD.values()),
        *(raw for raw, _ in UNTOLD.values()),
        *(message(str(uuid4()), GROUPED, embedded=embedded) for embedded, _ in EMBEDDED.values()),
        *(message(str(uuid4()), {"headers.task": task}, content=content) for task, content in TASKS.items()),
        *(
            message(str(uuid4()), embedded={"callbacks": [errand("reports", "report.done", options=options)]})
            for options in UNCALLABLE.values()
        ),
        *broken_jobs(),
        *forging_messages(),
    ]
    for raw in raws:
        host.send(raw)
    for raw in (*raws, *BROADCASTS.values()):
        host.broadcast(raw)
    host.ping()
    host.answer_another()

    assert SIGNED in str(raws), "or else there was nothing to find"
    lines = host.log.splitlines()
    assert [line[:200] for line in lines if SECRET in line] == []
    assert [line[:200] for line in lines if line.startswith(FORGED)] == []
    assert [line[:200] for line in lines if len(line) > MAX_LINE_CHARS] == []
    assert [line[:200] for line in lines if not line.isprintable()] == []
    assert [line for line in lines if "CRITICAL" in line.partition("]")[0]] == []


@pytest.mark.holds("docs/alerts.md#keyejobsfail", "`INTERNAL`: the traceback in the log")
def test_a_fault_of_the_worker_itself_is_told_without_the_job(host: EchoHost) -> None:
    job = host.client.submit(prompt="raise MemoryError", metadata={"source": SIGNED}, max_attempts=1)
    assert host.failure(job.id).code in (ErrorCode.OUT_OF_MEMORY, ErrorCode.INTERNAL)
    host.answer_another()
    assert job.id in host.log
    assert SECRET not in host.log
