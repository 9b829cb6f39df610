"""Every process that came of a command, however deep below it or far from it."""

from pathlib import Path


def living(folder: Path) -> list[str]:
    """Command lines of those that were told of this folder in their environment, or work in it."""
    return [found for process in Path("/proc").glob("[0-9]*") if (found := _find(process, folder))]


def _find(process: Path, folder: Path) -> str:
    try:
        # A server that shows a title of its own has written it over its environment.
        is_ours = str(folder).encode() in (process / "environ").read_bytes()
        is_ours = is_ours or (process / "cwd").readlink().is_relative_to(folder)
        # A zombie has no command line.
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode() if is_ours else ""
    except OSError:
        return ""
