"""A worker whose decoder child is taken over by its medium, and what came of it: `python -m` this prints one JSON.

The worker holds secrets, a connection, files of its user and another child; the child is the product's own, up to the
moment when it would wait for its first medium. It says what each act came to, then decodes as if nothing was. Named
layers of the sandbox are left out, or with `_SECCOMP` the call for one.
"""

import ctypes
import json
import logging
import mmap
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-P", "-m", "tests.support.compromised_decoder")
SECRET = "very-secret-aws"
STOLEN = b"sent by the child over the worker's own connection"
WORKER_STATE = ("worker", "victim", "doomed", "sibling", "connection")
_IS_X86 = platform.machine() == "x86_64"
# By their numbers, which are the same on every machine but where two are named.
_CALLS = {
    "pidfd_open": 434,
    "io_uring_setup": 425,
    "openat2": 437,
    "memfd_create": 319 if _IS_X86 else 279,
    "process_vm_readv": 310 if _IS_X86 else 270,
    "process_vm_writev": 311 if _IS_X86 else 271,
    "unshare": 272 if _IS_X86 else 97,
    "shmget": 29 if _IS_X86 else 194,
    "msgget": 68 if _IS_X86 else 186,
    "keyctl": 250 if _IS_X86 else 219,
    "bpf": 321 if _IS_X86 else 280,
    "perf_event_open": 298 if _IS_X86 else 241,
    "userfaultfd": 323 if _IS_X86 else 282,
    "execveat": 322 if _IS_X86 else 281,
    "setns": 308 if _IS_X86 else 268,
    "personality": 135 if _IS_X86 else 92,
    **({"open by its old number": 2} if _IS_X86 else {}),
}
# A container's own filter may end whoever calls by it.
_X32_CALLS = {"socket by its x32 number": 0x40000000 + 41}


def acts(state: dict[str, int | str]) -> "dict[str, Callable[[], object]]":
    """What code that took over a decoder would try; each raises `OSError` where the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    has_own_filter_only = "Seccomp:\t0" in Path("/proc/self/status").read_text()
    calls = {**_CALLS, **(_X32_CALLS if _IS_X86 and has_own_filter_only else {})}
    worker, sibling, connection = (int(state[name]) for name in ("worker", "sibling", "connection"))
    victim, doomed = str(state["victim"]), str(state["doomed"])

    def call(number: int, *told: object) -> int:
        done: int = libc.syscall(number, *told)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    def read_environment() -> str:
        return Path(f"/proc/{worker}/environ").read_text()

    def write_memory() -> None:
        heap = next(line for line in Path(f"/proc/{worker}/maps").read_text().splitlines() if "[heap]" in line)
        with open(f"/proc/{worker}/mem", "r+b", 0) as memory:
            memory.seek(int(heap.partition("-")[0], 16))
            memory.write(b"poison")

    def take_connection() -> None:
        taken = call(438, call(_CALLS["pidfd_open"], worker, 0), connection, 0)
        os.write(taken, STOLEN)

    def change_in_place() -> None:
        with open(victim, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            content[:8] = b"POISONED"

    def outlive_the_worker() -> None:
        if not os.fork():
            os.setsid()
            os._exit(0) if os.fork() else signal.pause()

    def raise_limit(which: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(which, resource.getrlimit(which))

    return {
        "read the worker's environment": read_environment,
        "read and write the worker's memory": write_memory,
        "take the worker's connection": take_connection,
        "read a file": lambda: Path(victim).read_text(),
        "list a folder": lambda: os.listdir("/"),
        "look whether a file is there": lambda: os.stat(victim),
        "change a file in place": change_in_place,
        "write to a file": lambda: os.close(os.open(victim, os.O_WRONLY | os.O_TRUNC)),
        "make a file": lambda: Path(victim + ".new").touch(),
        "truncate a file": lambda: os.truncate(victim, 0),
        "delete a file": lambda: os.unlink(doomed),
        "rename a file": lambda: os.rename(doomed, victim),
        "link a file": lambda: os.link(victim, victim + ".linked"),
        "make a symbolic link": lambda: os.symlink("/etc", victim + ".symlink"),
        "make a folder": lambda: os.mkdir(victim + ".folder"),
        "make a pipe with a name": lambda: os.mkfifo(victim + ".fifo"),
        "change the rights to a file": lambda: os.chmod(victim, 0o777),
        "change the folder it works in": lambda: os.chdir("/"),
        "make a socket": socket.socket,
        "make a pair of sockets": socket.socketpair,
        "make a pipe": os.pipe,
        "run a program": lambda: os.execv("/bin/sh", ["sh", "-c", "exit"]),
        "start a program": lambda: subprocess.run(["/bin/sh", "-c", "exit"], check=True),
        "fork, and outlive the worker": outlive_the_worker,
        "kill the worker": lambda: os.kill(worker, signal.SIGKILL),
        "kill a sibling": lambda: os.kill(sibling, signal.SIGKILL),
        "kill a sibling by its thread": lambda: call(234 if _IS_X86 else 131, sibling, sibling, signal.SIGKILL),
        "trace a sibling": lambda: call(101 if _IS_X86 else 117, 16, sibling, 0, 0),
        "live on without the worker": lambda: call(157 if _IS_X86 else 167, 1, 0, 0, 0, 0),
        "look at a sibling's limits": lambda: resource.prlimit(sibling, resource.RLIMIT_CPU),
        **{
            f"set its own {name}": raise_limit(getattr(resource, name))
            for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")
        },
        "become another user": lambda: os.setresuid(0, 0, 0),
        "have others' priority changed": lambda: os.setpriority(os.PRIO_PROCESS, sibling, 19),
        **{name: lambda number=number: call(number, 0, 0, 0, 0, 0, 0) for name, number in calls.items()},
    }


_HOSTILE = """
from keye.worker.media.decode import child as taken, sandbox
from tests.support.compromised_decoder import take_over
for layer in {left_out!r}:
    setattr(sandbox, layer, (-1, -1) if layer == "_SECCOMP" else lambda *_: None)
taken.serve = take_over({state!r}, taken.serve)
"""


def take_over(state: dict[str, int | str], serve: Callable[..., None]) -> Callable[..., None]:
    todo = acts(state)

    def act_and_serve(*told: object) -> None:
        for name, act in todo.items():
            try:
                came_to = f"done: {act()}"
            except OSError as refusal:
                came_to = f"refused: {refusal.errno}"
            print(json.dumps([name, came_to[:100]]), flush=True)
        serve(*told)

    return act_and_serve


def assert_harmless(came_of_it: dict[str, Any]) -> None:
    acts = came_of_it.pop("acts")
    assert len(acts) > 50
    assert {act: end for act, end in acts.items() if not end.startswith("refused")} == {}
    assert came_of_it == {
        "files": {"victim": "as it was", "doomed": "as it was"},
        "received": "",
        "is_sibling_alive": True,
        "leaves_processes": False,
        "decodes": ["red", "green", "blue", "yellow"],
    }


def main() -> None:
    # What others may read of it is what it was started with.
    if os.environ.get("AWS_SECRET_ACCESS_KEY") != SECRET:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET})
    from keye.worker.media.decode import decoder
    from keye.worker.media.decode.sandbox import hide_memory
    from keye.worker.media.decoded import DecodedImage
    from tests.support.decoder_bench import Bench, Pool
    from tests.support.decoder_children import children_of
    from tests.support.zoo import read_quarters

    told: list[str] = []
    logging.getLogger(decoder.__name__).addHandler(handler := logging.Handler())
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: whoever outlives a child is ours to see
    hide_memory()
    ours, peer = socket.socketpair()
    sibling = subprocess.Popen(["sleep", "100"])
    with tempfile.TemporaryDirectory() as folder:
        victim, doomed = Path(folder, "victim"), Path(folder, "doomed")
        victim.write_text("as it was")
        doomed.write_text("as it was")
        state = dict(
            zip(WORKER_STATE, (os.getpid(), str(victim), str(doomed), sibling.pid, ours.fileno()), strict=True)
        )
        imports, _, start = decoder._PROGRAM.strip().rpartition("\n")
        decoder._PROGRAM = imports + _HOSTILE.format(state=state, left_out=sys.argv[1:]) + start
        with Pool(1, silence_seconds=60, max_decoded_bytes=2**24) as pool:
            bench = Bench(pool, Path(folder), children_of(os.getpid()))
            image = bench.decode(bench.photo)
            assert isinstance(image, DecodedImage)
        files = {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix not in (".mp4", ".png")}
    peer.setblocking(False)
    try:
        received = peer.recv(100).decode()
    except BlockingIOError:
        received = ""
    is_sibling_alive = sibling.poll() is None
    sibling.kill()
    sibling.wait()
    try:
        os.waitpid(-1, os.WNOHANG)
        leaves_processes = True
    except ChildProcessError:
        leaves_processes = False
    lines = [line.strip() for text in told for line in text.splitlines()]
    came_of_it = {
        "acts": dict(json.loads(line) for line in lines if line.startswith("[")),
        "files": files,
        "received": received,
        "is_sibling_alive": is_sibling_alive,
        "leaves_processes": leaves_processes,
        "decodes": read_quarters(image.pixels),
    }
    print(json.dumps(came_of_it))


if __name__ == "__main__":
    main()
