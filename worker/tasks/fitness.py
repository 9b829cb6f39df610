"""Whether the host lets this worker run jobs: a sick worker takes none, and probes itself until it is well again."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from keye.worker.broker.admission import Admission
from keye.worker.host_fault import HostFault, host_fault_of
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.telemetry import metrics

LOOK_SECONDS = 0.25
# Of so many different jobs, with none answered between them, the place is to blame although its probe passes.
MAX_IN_A_ROW = 3
# What a job met may be gone by the time of the probe, and another worker is to have it first.
REST_SECONDS = 1.0
# Twice what a probe takes that waits for others.
MAX_PROBE_SECONDS = 10.0
# The last of 1, 2, 4 .. seconds between two probes: a worker is well again no later than so long after its host.
MAX_PAUSE_SECONDS = 15.0

log = logging.getLogger(__name__)


class Fitness(PeriodicThread):
    """Closes the worker's door where its host is sick, and opens it when a probe passes.

    `probe` tries what every job needs; it returns False where it could not tell, and raises what it met. `tell` is
    called with why the worker is sick, and with "" once it is well again.
    """

    def __init__(self, probe: Callable[[], bool], admission: Admission, tell: Callable[[str], None]) -> None:
        super().__init__("fitness", LOOK_SECONDS)
        self._probe = probe
        self._admission = admission
        self._tell = tell
        self._lock = threading.RLock()
        self._sickness: HostFault | None = None
        self._sick_since = 0.0
        # Jobs that met a fault of the host since one was answered.
        self._met: set[str] = set()
        self._num_pauses = 0
        self._next_move_at = 0.0
        self._probed_at = 0.0
        self._is_proven = False
        self._probing: Future[bool] = Future()
        self._probing.set_result(False)

    @property
    def takes_jobs(self) -> bool:
        return self._admission.is_open

    def answered(self) -> None:
        """A job was: whatever was wrong is over. Never waits, as for a probe."""
        self._met = set()
        self._num_pauses = 0

    def suffered(self, fault: HostFault, job_id: str) -> bool:
        """A job met it; True where a probe passes all the same, which speaks against the job. Waits for the probe."""
        metrics.HOST_FAULTS.inc()
        met_at = time.monotonic()
        # At once, so that what is given back is another worker's.
        self._admission.is_open = False
        with self._lock:
            self._met.add(job_id)
            if fault.is_final:
                self._fall_sick(fault)
            if self._sickness is not None:
                return False
            if self._probed_at < met_at:
                self._examine()
            if self._sickness is None and len(self._met) >= MAX_IN_A_ROW:
                self._fall_sick(
                    HostFault(f"{len(self._met)} jobs in a row met a fault of this host, the last: {fault}")
                )
            return self._is_proven

    def turn(self) -> None:
        with self._lock:
            if self.takes_jobs or time.monotonic() < self._next_move_at:
                return
            if self._sickness is not None:
                self._examine()
                if not self._is_proven:
                    return
                log.warning("This worker is well again after %.0f s", time.monotonic() - self._sick_since)
                self._sickness = None
                self._tell("")
            self._admission.is_open = True

    def _examine(self) -> None:
        self._probed_at = time.monotonic()
        self._is_proven = False
        try:
            self._is_proven = self._probe_in_time()
        except Exception as error:
            self._fall_sick(host_fault_of(error) or HostFault(f"the probe failed with {type(error).__name__}: {error}"))
        else:
            stays_sick = self._sickness is not None and not self._is_proven
            self._next_move_at = time.monotonic() + (self._pause() if stays_sick else REST_SECONDS)

    def _probe_in_time(self) -> bool:
        """In a thread of its own: a disk may never answer, and the job that waits for this is not to hang with it."""
        if self._probing.done():
            probing: Future[bool] = Future()
            # A host that starts no more threads is what this then raises.
            threading.Thread(target=self._run_probe, args=(probing,), name="probe", daemon=True).start()
            self._probing = probing
        wait([self._probing], MAX_PROBE_SECONDS)
        if not self._probing.done():
            raise HostFault(f"a probe of this host has not ended after {MAX_PROBE_SECONDS:g} s")
        return self._probing.result()

    def _run_probe(self, probing: "Future[bool]") -> None:
        try:
            probing.set_result(self._probe())
        except BaseException as error:
            probing.set_exception(error)

    def _fall_sick(self, fault: HostFault) -> None:
        """Or stay sick, for another while."""
        pause = float("inf") if fault.is_final else self._pause()
        self._next_move_at = time.monotonic() + pause
        what = "a fresh process is to take its place" if fault.is_final else f"it probes itself again in {pause:g} s"
        is_news = self._sickness is None or str(self._sickness) != str(fault)
        if self._sickness is None:
            self._sick_since = time.monotonic()
        self._sickness = fault
        level = logging.ERROR if is_news else logging.DEBUG
        log.log(level, "This worker is sick and takes no jobs, %s: %s", what, fault)
        if is_news:
            self._tell(str(fault))

    def _pause(self) -> float:
        self._num_pauses += 1
        return min(2.0 ** (self._num_pauses - 1), MAX_PAUSE_SECONDS)
