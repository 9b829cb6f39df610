"""What somebody may publish on the channel of Celery's remote control, and no worker may stumble over."""

import bz2
import zlib
from typing import Any

from tests.integration.hostile.messages import (
    ABSENT,
    HUGE,
    LINE_BREAK,
    NAN,
    SIGNED,
    as_body,
    canvas,
    command,
    errand,
    message,
    nested,
)

LONGEST_INT = 10**4300 - 1
# 10 characters of a log for each.
UNPRINTABLE = "\U000e0001"


def with_reply(**reply_to: Any) -> bytes:
    return command("ping", reply_to=reply_to, ticket="the-ticket")


BROADCASTS: dict[str, bytes] = {
    "no JSON": SIGNED.encode(),
    "no JSON, and long": SIGNED.encode() * 1000,
    "not UTF-8": b"\xff\xfe" + SIGNED.encode(),
    "cut short": command("ping")[:-2],
    "empty": b"",
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "an object": b"{}",
    "a task": message("a-task"),
    "deep": nested(100_000),
    "deep in its body": command("ping", {"body": as_body(nested(100_000))}),
    "as deep as can be read": command("ping", {"body": as_body(nested(960))}),
    "arguments as deep as can be read": command(
        "ping", {"body": as_body(b'{"method": "ping", "arguments": {"a": ' + nested(950) + b"}}")}
    ),
    "no body": command("ping", {"body": ABSENT}),
    "empty body": command("ping", {"body": ""}),
    "body not base64": command("ping", {"body": "%%%"}),
    "body no JSON": command("ping", {"body": as_body(SIGNED.encode())}),
    "body [1]": command("ping", {"body": as_body([1])}),
    "body {}": command("ping", {"body": as_body({})}),
    "body a number": command("ping", {"body": as_body(7)}),
    "body of Python's own types": command("ping", arguments={"a": {"__type__": "datetime", "__value__": SIGNED}}),
    "body of nobody's types": command("ping", arguments={"a": {"__type__": "nonsense", "__value__": SIGNED}}),
    "of nobody's types": command("ping", {"properties.later": {"__type__": "nonsense", "__value__": SIGNED}}),
    "compressed": command(
        "ping", {"headers": {"compression": "application/x-bz2"}, "body": as_body(bz2.compress(b"{}"))}
    ),
    "compressed, a bomb": command(
        "ping", {"headers": {"compression": "application/x-gzip"}, "body": as_body(zlib.compress(bytes(3 * 10**8), 1))}
    ),
    "as pickle": command("ping", {"content-type": "application/x-python-serialize"}),
    "encoded as nobody knows": command("ping", {"content-encoding": "rot13"}),
    "headers a list": command("ping", {"headers": []}),
    "clock a list": command("ping", {"headers": {"clock": []}}),
    "clock in words": command("ping", {"headers": {"clock": "late"}}),
    "clock NaN": command("ping", {"headers": {"clock": NAN}}),
    "clock of 400 digits": command("ping", {"headers": {"clock": HUGE}}),
    "clock without end": command("ping", {"headers": {"clock": LONGEST_INT}}),
    "clock before all times": command("ping", {"headers": {"clock": -HUGE}}),
    "properties a list": command("ping", {"properties": []}),
    "delivery_tag absent": command("ping", {"properties.delivery_tag": ABSENT}),
    "delivery_tag a list": command("ping", {"properties.delivery_tag": []}),
    "delivery_info absent": command("ping", {"properties.delivery_info": ABSENT}),
    "method absent": command("ping", {"body": as_body({"arguments": {}})}),
    "method a list": command("ping", {"body": as_body({"method": ["ping"]})}),
    "method of nobody": command("dance"),
    "method of nobody, and long": command(UNPRINTABLE * 1024),
    "method with a line break": command(LINE_BREAK),
    "method with a line break and a reply": command(
        LINE_BREAK, reply_to={"exchange": "reply.celery.pidbox", "routing_key": "x"}
    ),
    "arguments a list": command("ping", arguments=[1]),
    "arguments in words": command("ping", arguments="all"),
    "arguments of nobody": command("ping", arguments={"state": 1, "self": 2}),
    "arguments with a line break": command("ping", arguments={LINE_BREAK: 1}),
    "arguments without end": command("ping", arguments={"a" * 10**6: 1}),
    "fields of nobody": command("ping", self=1, state=2),
    "destination a number": command("ping", destination=7),
    "destinations of all kinds": command("ping", destination=[7, {}, []]),
    "destination of nobody": command("ping", destination=["celery@nobody"]),
    "pattern a list": command("ping", pattern=[], matcher=[]),
    "matcher of nobody": command("ping", pattern="*", matcher="nobody"),
    "pattern no pattern": command("ping", pattern="(", matcher="pcre"),
    "pattern without end": command("ping", pattern="(((((.+)+)+)+)+)+!", matcher="pcre"),
    "pattern of stars": command("ping", pattern="*a" * 500 + "!", matcher="glob"),
    "reply_to in words": command("ping", reply_to="other-app"),
    "reply_to empty": command("ping", reply_to={}),
    "reply to a foreign queue": with_reply(exchange="", routing_key="other-app"),
    "reply to a key of ours": with_reply(exchange="", routing_key="keye:leases"),
    "reply to a foreign exchange": with_reply(exchange="other-app", routing_key="other-app"),
    "reply to an exchange like it": with_reply(exchange="reply.celery.pidbox\n", routing_key="other-app"),
    "reply to an exchange of a like name": with_reply(exchange="replyXceleryXpidbox", routing_key="other-app"),
    "reply to a key nobody has bound": with_reply(exchange="reply.celery.pidbox", routing_key="other-app"),
    "reply to a list": with_reply(exchange=["reply.celery.pidbox"], routing_key=["other-app"]),
    "reply without an exchange": with_reply(routing_key="other-app"),
    "reply and a ticket of a kind": command(
        "ping", reply_to={"exchange": "reply.celery.pidbox", "routing_key": "x"}, ticket=[NAN]
    ),
    "revoke of nothing": command("revoke"),
    "revoke of a list of lists": command("revoke", arguments={"task_id": [[], {}, 7, None, LINE_BREAK]}),
    "revoke of a number": command("revoke", arguments={"task_id": 7}),
    "revoke by an id of no job": command(
        "revoke", arguments={"task_id": "x:events", "terminate": True, "signal": "KILL"}
    ),
    "revoke by headers": command("revoke_by_stamped_headers", arguments={"headers": {"a": [1]}}),
    "terminate": command("terminate", arguments={"signal": "KILL", "task_id": "nobody"}),
    "query of all kinds": command("query_task", arguments={"ids": [[], {}, 7]}),
    "objects": command("objgraph", arguments={"num": HUGE, "type": "Request"}),
    "memory": command("memsample"),
    "conf with a default of a kind": command("conf", arguments={"with_defaults": []}),
    "a body of a canvas": command("ping", arguments=canvas("group", tasks=[errand()])),
}

# Celery's commands that change or end a worker.
CHANGES: dict[str, dict[str, Any]] = {
    "shutdown": {},
    "pool_shrink": {"n": 8},
    "pool_grow": {"n": 1000},
    "pool_restart": {"modules": ["os"], "reload": True},
    "autoscale": {"max": 0, "min": 0},
    "rate_limit": {"task_name": "keye.analyze", "rate_limit": "1/h"},
    "time_limit": {"task_name": "keye.analyze", "hard": 0.001, "soft": 0.001},
    "cancel_consumer": {"queue": "keye.jobs"},
    "add_consumer": {"queue": "other-app"},
    "enable_events": {},
    "election": {"id": 1, "topic": "x", "action": errand()},
    "revoke_by_stamped_headers": {"headers": {"a": "b"}},
}
