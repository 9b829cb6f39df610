"""A container as Docker makes one of our image, by runc: nothing of it can be written but what compose mounts, and it
has no capabilities, no root, 64 MiB of /dev/shm and Docker's default seccomp profile. The network is the host's.

The image's root is stood in for by this machine's /usr and the environment that the tests run in, read only.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.checkout import ROOT

UID = 999
# What Docker's default profile refuses a container without capabilities, of what this kernel may know.
REFUSED = (
    "acct add_key bpf chroot clock_settime create_module delete_module fanotify_init finit_module fsconfig "
    "fsmount fsopen fspick get_kernel_syms get_mempolicy init_module io_uring_enter io_uring_register "
    "io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie mbind migrate_pages "
    "mount mount_setattr move_mount move_pages nfsservctl open_by_handle_at open_tree perf_event_open "
    "pidfd_getfd pivot_root process_madvise query_module quotactl quotactl_fd reboot request_key "
    "set_mempolicy set_mempolicy_home_node setdomainname sethostname setns settimeofday swapoff swapon sysfs "
    "_sysctl syslog umount2 unshare uselib userfaultfd ustat vhangup vserver"
)
# Of clone: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NEW_NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
AF_VSOCK = 40
EPERM, ENOSYS = 1, 38
HIDDEN = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"]
FIXED = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def seccomp() -> dict[str, Any]:
    """Docker allows by name and refuses the rest; this says the same the other way round."""

    def refuse(names: list[str], errno: int = EPERM, **argument: Any) -> dict[str, Any]:
        rule = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno}
        return rule | ({"args": [argument]} if argument else {})

    namespaces = [
        refuse(["clone"], index=0, value=flag, valueTwo=flag, op="SCMP_CMP_MASKED_EQ") for flag in NEW_NAMESPACES
    ]
    # A C library that is told so asks for clone, whose flags can be looked at.
    others = [refuse(["clone3"], ENOSYS), refuse(["socket"], index=0, value=AF_VSOCK, op="SCMP_CMP_EQ")]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refuse(REFUSED.split()), *namespaces, *others]}


class Container:
    """Runs `command` on entering; killed and gone on leaving. `log` holds what it says."""

    def __init__(
        self, runc: str, folder: Path, command: list[str], environ: Mapping[str, str], tmpfs: Iterable[str]
    ) -> None:
        """`tmpfs` is as compose has it: folders, each with its options after a colon."""
        self._runc = [runc, "--root", str(folder / "runc")]
        self._folder = folder
        self._name = f"keye-test-{os.getpid()}-{folder.name}"
        self.log_file = folder / "container.log"
        self.environ = environ
        self._tmpfs = {place: options.split(",") for place, _, options in (each.partition(":") for each in tmpfs)}
        self.volumes = {name: folder / name for name in ("keye-media", "keye-spool")}
        self.media = folder / "media"
        self.media.mkdir()
        for volume in self.volumes.values():
            volume.mkdir()
            os.chown(volume, UID, UID)
        self._make_root()
        (folder / "config.json").write_text(json.dumps(self._config(command)))

    def _make_root(self) -> None:
        root = self._folder / "rootfs"
        root.mkdir()
        for name in ("bin", "lib", "lib64", "sbin"):
            (root / name).symlink_to(f"usr/{name}")
        etc = root / "etc"
        etc.mkdir()
        (etc / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nkeye:x:{UID}:{UID}::/home/keye:/bin/sh\n")
        (etc / "group").write_text(f"root:x:0:\nkeye:x:{UID}:\n")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        for place in (*self._read_only(), "/proc", "/sys", "/dev", "/tmp", "/model"):
            (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for name in (*self.volumes, "keye-run"):
            folder = root / "var/tmp" / name
            folder.mkdir(mode=0o700, parents=True)
            os.chown(folder, UID, UID)

    @staticmethod
    def _read_only() -> list[str]:
        """Folders of this machine that are the image's; who holds others is mounted before them."""
        return sorted({"/usr", sys.prefix, sys.base_prefix, str(ROOT)})

    def _config(self, command: list[str]) -> dict[str, Any]:
        def mount(where: str, kind: str, source: str, *options: str) -> dict[str, Any]:
            return {"destination": where, "type": kind, "source": source, "options": list(options)}

        tight = ("nosuid", "nodev")
        mounts = [
            mount("/proc", "proc", "proc"),
            mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            mount("/dev/shm", "tmpfs", "shm", *tight, "noexec", "mode=1777", "size=65536k"),
            mount("/dev/mqueue", "mqueue", "mqueue", *tight, "noexec"),
            mount("/sys", "bind", "/sys", "rbind", *tight, "noexec", "ro"),
            # First: this checkout may lie below /tmp. Docker's own options stand before those of compose.
            *(mount(place, "tmpfs", "tmpfs", "noexec", *tight, *asked) for place, asked in self._tmpfs.items()),
            *(mount(place, "bind", place, "rbind", "ro") for place in self._read_only()),
            mount(str(self.media), "bind", str(self.media), "rbind", "ro"),
            mount("/model", "bind", str(ROOT / "worker/demo/checkpoint"), "rbind", "ro"),
            *(mount(f"/var/tmp/{name}", "bind", str(path), "rbind", "rw") for name, path in self.volumes.items()),
        ]
        none: list[str] = []
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": UID, "gid": UID},
                "args": command,
                "env": [f"{name}={value}" for name, value in self.environ.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "ambient"), none),
                "noNewPrivileges": True,
            },
            "root": {"path": "rootfs", "readonly": True},
            "hostname": "keye",
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
                "seccomp": seccomp(),
                "maskedPaths": HIDDEN,
                "readonlyPaths": FIXED,
            },
        }

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._runc, "run", "--bundle", str(self._folder), self._name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        subprocess.run([*self._runc, "delete", "--force", self._name], capture_output=True)
        self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """In the container, as a health check is."""
        environ = [part for name, value in self.environ.items() for part in ("--env", f"{name}={value}")]
        return subprocess.run([*self._runc, "exec", *environ, self._name, *command], capture_output=True, text=True)

    def signal(self, name: str) -> None:
        subprocess.run([*self._runc, "kill", self._name, name], check=True)
