"""What is done to the media of one job at once: results in order, the first fault ends the rest. Knows no media."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from contextvars import copy_context
from functools import partial
from threading import Event, Thread
from typing import TypeVar

from keye.config.faults import Fault

Made = TypeVar("Made")

# How often a job that waits looks whether it is over.
_TICK_SECONDS = 0.1


def do_side_by_side(
    calls: Sequence[Callable[[Callable[[], None]], Made]],
    max_at_once: int,
    check: Callable[[], None],
    leave: Callable[[Sequence[Future[Made]]], object],
) -> list[Made]:
    """What each of `calls` returns; it is given what to call often, and raises what that raises.

    `check` is called several times a second. What it raises, or the first call to fail, ends the others, and `leave` is
    given them all to see to what still comes. The `Fault` of a medium has its call's number as `media_index`.
    """
    given_up = Event()

    def go_on() -> None:
        if given_up.is_set():
            raise CancelledError

    futures: list[Future[Made]] = [Future() for _ in calls]
    waiting = deque(zip(futures, calls, strict=True))
    try:
        _start_threads(min(max_at_once, len(calls)), partial(_work, waiting, go_on))
        while not _have_all_ended(futures):
            check()
        return [future.result() for future in futures]
    except BaseException:
        given_up.set()
        _work(waiting, go_on)  # what has not begun ends at once, even where no thread is there to see to it
        leave(tuple(futures))
        raise
    finally:
        # An error's traceback leads to here: the pixels of all would live until a search for cycles.
        futures.clear()


def _start_threads(count: int, work: Callable[[], None]) -> None:
    for number in range(count):
        # These end with the process: an executor's would hold up its exit. Their context names the job in the log.
        thread = Thread(target=partial(copy_context().run, work), name="media", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # No more can be started: the first will do.
            if not number:
                raise
            return


def _work(
    waiting: "deque[tuple[Future[Made], Callable[[Callable[[], None]], Made]]]", go_on: Callable[[], None]
) -> None:
    while True:
        try:
            future, call = waiting.popleft()
        except IndexError:
            return
        try:
            go_on()  # what has not begun by then need not
            future.set_result(call(go_on))
        except BaseException as error:
            future.set_exception(error)
        del future, call  # they hold what came of it


def _have_all_ended(futures: Sequence[Future[Made]]) -> bool:
    """Waits a tick for it. Raises what one of them failed by."""
    wait(futures, _TICK_SECONDS, FIRST_EXCEPTION)
    have_ended = [future.done() for future in futures]
    for media_index in [index for index, has_ended in enumerate(have_ended) if has_ended]:
        try:
            futures[media_index].result()
        except Fault as fault:
            # No medium is to blame for the end of the job, which a call may find out too.
            if fault.code.startswith("MEDIA_"):
                fault.media_index = media_index
            raise
    return all(have_ended)
