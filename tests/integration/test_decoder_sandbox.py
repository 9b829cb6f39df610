"""What a decoder child may not do, tried in processes of their own."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.holds("docs/design.md#decisions", "meets a decoder in a process without network")
@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "Children can make no socket: the kernel refuses it (a seccomp filter), whoever the user is",
)
def test_no_user_reaches_the_network_from_the_sandbox() -> None:
    """Not even with system calls that name sockets by other numbers."""
    code = """
import ctypes, os, platform, socket, sys
from keye.worker.media.decode.sandbox import confine
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1)  # what belongs to this process is its own again, as after a start by that user
kept, other = socket.socketpair()
confine(os.getppid())
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    try:
        socket.socket(family)
    except PermissionError:
        kept.send(b"refused ")
libc = ctypes.CDLL(None, use_errno=True)
for number in (425, 0x40000000 + 41)[: 2 if platform.machine() == "x86_64" else 1]:
    if libc.syscall(number, 2, 1, 0) == -1 and ctypes.get_errno() == 1:
        kept.send(b"refused ")
    else:
        kept.send(b"let through ")
print(other.recv(100).decode())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["refused"] * (5 if platform.machine() == "x86_64" else 4)


def test_decoding_modules_import_no_torch() -> None:
    code = "import sys, keye.worker.media.decode.child; print({'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
