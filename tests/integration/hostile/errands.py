"""What messages may ask a worker to do for their sender besides the job, each way that Celery has for it."""

from typing import Any

from tests.integration.hostile.messages import canvas, errand

# Of `SETTINGS` in the tests of errands: what may be called afterwards.
ALLOWED = "reports/report.*"
REPORT = errand("reports", "report.done")

# What is embedded in the body, and a part of the reason why it is refused; the headers are `GROUPED`.
GROUPED = {"headers.group": "the-group", "headers.group_index": 0}
NAMED_BY_NOBODY = "which KEYE_CELERY_CANVAS does not name"
EMBEDDED: dict[str, tuple[dict[str, Any], str]] = {
    "callback": ({"callbacks": [errand()]}, NAMED_BY_NOBODY),
    "errback": ({"errbacks": [errand()]}, NAMED_BY_NOBODY),
    "chain": ({"chain": [errand()]}, NAMED_BY_NOBODY),
    "chord": ({"chord": errand()}, NAMED_BY_NOBODY),
    "second callback": ({"callbacks": [REPORT, errand()]}, NAMED_BY_NOBODY),
    "first of a chain": ({"chain": [errand(), REPORT]}, NAMED_BY_NOBODY),
    "callback onto the leases": ({"callbacks": [errand("keye:leases")]}, NAMED_BY_NOBODY),
    "callback onto a record": ({"callbacks": [errand("keye:job:x")]}, NAMED_BY_NOBODY),
    "callback onto the quarantine": ({"callbacks": [errand("keye:quarantine")]}, NAMED_BY_NOBODY),
    "callback onto a result": ({"callbacks": [errand("celery-task-meta-x")]}, NAMED_BY_NOBODY),
    "callback into our own queue": ({"callbacks": [errand("keye.jobs", "keye.analyze")]}, NAMED_BY_NOBODY),
    "callback into no queue": ({"callbacks": [errand(None)]}, "on no queue"),
    "callback into a queue of no name": ({"callbacks": [errand("")]}, NAMED_BY_NOBODY),
    "callback into a list of queues": ({"callbacks": [errand(["other-app"])]}, "on no queue"),
    "callback into a queue by its options": ({"callbacks": [errand({"name": "other-app"})]}, "on no queue"),
    "callback of another task": ({"callbacks": [errand("reports")]}, NAMED_BY_NOBODY),
    "callback of a task like it": ({"callbacks": [errand("reports", "reporting")]}, NAMED_BY_NOBODY),
    "callback into a queue like it": ({"callbacks": [errand("reports2", "report.done")]}, NAMED_BY_NOBODY),
    "callback into a queue that looks like queue and task": (
        {"callbacks": [errand("reports/report.of", "billing.refund")]},
        NAMED_BY_NOBODY,
    ),
    "callback by way of an exchange": (
        {"callbacks": [errand("reports", "report.done", options={"exchange": "", "routing_key": "other-app"})]},
        "which are refused",
    ),
    "callback in another format": (
        {"callbacks": [errand("reports", "report.done", options={"serializer": "pickle"})]},
        "which are refused",
    ),
    "callback to another server": (
        {"callbacks": [errand("reports", "report.done", options={"connection": "redis://203.0.113.1"})]},
        "which are refused",
    ),
    "callback of a callback": (
        {"callbacks": [errand("reports", "report.done", options={"link": [errand()]})]},
        NAMED_BY_NOBODY,
    ),
    "callback of a callback that is no list": (
        {"callbacks": [errand("reports", "report.done", options={"link": errand()})]},
        NAMED_BY_NOBODY,
    ),
    "errback of a callback": (
        {"callbacks": [errand("reports", "report.done", options={"link_error": [errand()]})]},
        NAMED_BY_NOBODY,
    ),
    "chain of a callback": (
        {"callbacks": [errand("reports", "report.done", options={"chain": [errand()]})]},
        NAMED_BY_NOBODY,
    ),
    "chord of a callback": (
        {"callbacks": [errand("reports", "report.done", options={"chord": errand()})]},
        NAMED_BY_NOBODY,
    ),
    "group of callbacks": ({"callbacks": [canvas("group", tasks=[REPORT, errand()])]}, NAMED_BY_NOBODY),
    "group that is no list": ({"callbacks": [canvas("group", tasks=errand())]}, NAMED_BY_NOBODY),
    "group by its positional arguments": ({"callbacks": [{**canvas("group"), "args": [[errand()]]}]}, "canvas"),
    "group of a list": ({"callbacks": [canvas("group", tasks=[[errand()]])]}, "what is to be called"),
    "group of nothing, for a queue": ({"callbacks": [canvas("group", {"queue": "other-app"}, tasks=[])]}, "canvas"),
    "group by its name only": (
        {"callbacks": [errand("other-app", "celery.group", kwargs={"tasks": []})]},
        NAMED_BY_NOBODY,
    ),
    "group under another name": (
        {"callbacks": [errand("reports", "report.done", subtask_type="group", kwargs={"tasks": [errand()]})]},
        "canvas",
    ),
    "group that leads its tasks elsewhere": (
        {"callbacks": [canvas("group", {"queue": "other-app"}, tasks=[REPORT])]},
        "canvas",
    ),
    "chain that leads its tasks elsewhere": (
        {"callbacks": [canvas("chain", {"queue": "other-app"}, tasks=[REPORT])]},
        "canvas",
    ),
    "chain of chains": ({"chain": [canvas("chain", tasks=[canvas("chain", tasks=[errand()])])]}, NAMED_BY_NOBODY),
    "header of a chord": ({"callbacks": [canvas("chord", header=[errand()], body=REPORT)]}, NAMED_BY_NOBODY),
    "header of a chord that is a group": (
        {"callbacks": [canvas("chord", header=canvas("group", tasks=[errand()]), body=REPORT)]},
        NAMED_BY_NOBODY,
    ),
    "body of a chord": ({"callbacks": [canvas("chord", header=[REPORT], body=errand())]}, NAMED_BY_NOBODY),
    "chord without a body": ({"callbacks": [canvas("chord", header=[REPORT])]}, "canvas"),
    "map": ({"callbacks": [canvas("xmap", task=errand(), it=[1])]}, "canvas"),
    "chunks": ({"callbacks": [canvas("chunks", task=errand(), it=[1], n=1)]}, "canvas"),
    "canvas of a kind that nobody knows": ({"callbacks": [canvas("spiral", tasks=[errand()])]}, "canvas"),
    **{
        f"{name} as a callback": ({"callbacks": [errand("reports", f"celery.{name}")]}, NAMED_BY_NOBODY)
        for name in ("map", "starmap", "chunks", "chord_unlock", "backend_cleanup", "accumulate")
    },
}

NO_TASK_OF_OURS = "none of ours"
# Celery's own tasks, which send or run what lies in their arguments, or clean up.
TASKS: dict[str, list[Any]] = {
    "celery.map": [[errand(None, "keye.analyze"), [[None], [None]]], {}, {}],
    "celery.starmap": [[errand(None, "keye.analyze"), [[None], [None]]], {}, {}],
    "celery.chunks": [[errand(None, "keye.analyze"), [[1]], 1], {}, {}],
    "celery.group": [[[errand()], "the-group", [["the-group", None], None], True], {}, {}],
    "celery.chain": [[errand()], {"tasks": [errand()]}, {}],
    "celery.chord": [[[errand()], errand()], {}, {}],
    "celery.chord_unlock": [["the-group"], {"callback": errand(), "interval": 0.1, "max_retries": 1, "result": []}, {}],
    "celery.backend_cleanup": [[], {}, {}],
    "celery.accumulate": [[1, 2, 3], {}, {}],
    "celery.ping": [[], {}, {}],
}

# Options of a signature that is allowed, by which Celery cannot call it.
UNCALLABLE = {
    "a delay in words": {"countdown": "soon"},
    "a time in words": {"eta": "soon"},
    "an end in words": {"expires": []},
    "a priority of a kind": {"priority": []},
    "a policy of a kind": {"retry_policy": {"max_retries": []}},
    "an id of a kind": {"task_id": ["x"]},
}
