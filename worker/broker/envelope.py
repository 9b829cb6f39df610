"""A message as kombu and Celery write them, read without either: no field of it may raise in their code."""

import json
from base64 import b64decode
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keye.config.contract import describe_faults, escaped
from keye.config.wire import MAX_JSON_PARTS, MAX_SEALED_BYTES

# A sealed job as base64, and some more for what Celery's clients put beside it.
MAX_MESSAGE_BYTES = MAX_SEALED_BYTES * 3 // 2
# Each may be a fault of its own, and as one it takes a kilobyte.
MAX_JSON_VALUES = 100_000
# Celery has less of the stack left than we, and would lose what it cannot read. The models of a job end at about 200.
MAX_JSON_DEPTH = 500
# It goes into a line of the log, and into an outcome.
MAX_REASON_CHARS = 1000

Model = TypeVar("Model", bound=BaseModel)
Name = Annotated[str, Field(max_length=1024)]


class Unreadable(ValueError):
    """Why no worker can make anything of it, in brief; without its content, which may hold signed URLs."""

    def __init__(self, reason: str) -> None:
        # It may name what somebody else has named, line breaks and all.
        printable = escaped(reason[:MAX_REASON_CHARS])
        is_whole = max(len(reason), len(printable)) <= MAX_REASON_CHARS
        super().__init__(printable if is_whole else f"{printable[:MAX_REASON_CHARS]} ...")


class Foreign(BaseModel):
    """What somebody else's program wrote: fields that are not looked at may be there."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Headers(Foreign):
    """Celery's task protocol 2, or the body of protocol 1."""

    task: Name
    id: Name
    timelimit: tuple[float | None, float | None] | None = None
    eta: Name | None = None
    expires: Name | None = None
    retries: int | None = None
    group: Name | None = None
    group_index: int | None = None
    root_id: Name | None = None
    parent_id: Name | None = None
    shadow: Name | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    ignore_result: bool | None = None
    stamps: dict[str, Any] | None = None
    stamped_headers: list[str] | None = None
    replaced_task_nesting: int | None = None
    # `keye.config.topology.RECORDED`
    keye_recorded: bool | None = None
    # Libraries that trace put it there by themselves: one that is none is no reason to refuse the job.
    traceparent: Any = None


class DeliveryInfo(Foreign):
    exchange: Name | None
    routing_key: Name | None


class Properties(Foreign):
    delivery_tag: Name | int
    delivery_info: DeliveryInfo
    body_encoding: Literal["base64", "utf-8", None] = None
    priority: int | None = None


class Envelope(Foreign):
    """`headers` are read later: what they must hold depends on the protocol, and on whose message it is."""

    body: str
    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8", "utf8", "us-ascii", "ascii", "binary", None] = Field(
        default=None, alias="content-encoding"
    )
    headers: dict[str, Any] = Field(default_factory=dict)
    properties: Properties

    def content(self) -> Any:
        """The decoded body. Raises `Unreadable`; a compressed one is never expanded."""
        if self.headers.get("compression"):
            raise Unreadable("its body is compressed: a few bytes may hold gigabytes. Send it as it is")
        body = self.body.encode(errors="surrogatepass")
        if self.properties.body_encoding == "base64":
            try:
                body = b64decode(b"".join(body.split()), validate=True)
            except ValueError:
                raise Unreadable("its body is no base64, as its body_encoding says") from None
        return parse(body, "its body")


def parse(text: bytes, name: str) -> Any:
    """Decoded JSON. Raises `Unreadable`, before any memory is taken, for one that would take much."""
    if len(text) > MAX_MESSAGE_BYTES:
        raise Unreadable(f"{name} has {len(text)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    parts = sum(text.count(mark) for mark in (b",", b"[", b"{")) if len(text) > MAX_JSON_DEPTH else 0
    if parts > MAX_JSON_PARTS:
        raise Unreadable(f"{name} has {parts} commas and brackets, the limit is {MAX_JSON_PARTS}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unreadable(f"{name} is nested too deeply") from None
    except ValueError:
        raise Unreadable(f"{name} is no JSON") from None
    if parts > MAX_JSON_DEPTH:
        _check_extent(value, name)
    return value


def _check_extent(value: Any, name: str) -> None:
    num_values, depth, level = 0, 0, [value]
    while level:
        num_values += len(level)
        depth += 1
        if num_values > MAX_JSON_VALUES:
            raise Unreadable(f"{name} holds more than {MAX_JSON_VALUES} values")
        if depth > MAX_JSON_DEPTH:
            raise Unreadable(f"{name} is nested too deeply")
        holders = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [inner for holder in holders for inner in holder]


def read_envelope(message: Any) -> Envelope:
    """Raises `Unreadable` with every fault of it."""
    if not isinstance(message, dict):
        raise Unreadable("it is no JSON object")
    return validated(Envelope, message, "message")


def validated(model: type[Model], value: Any, name: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise Unreadable(f"{name}: {describe_faults(error)}") from None
