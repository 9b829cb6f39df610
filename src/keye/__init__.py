"""Ask Keye-VL about images and videos: `from keye import Client, ImagePart`. Nothing is loaded before it is used.

`keye.producer` is the asking side and offers all of these names but `Analyzer`, which asks and answers in one process;
`keye.worker` answers, `keye.config` is what both agree on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keye.producer import *  # noqa: F403
    from keye.worker.in_process.analyzer import Analyzer as Analyzer

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("keye-worker")
    if name == "Analyzer":
        from keye.config.faults import install_command

        try:
            return import_module("keye.worker.in_process.analyzer").Analyzer
        except ModuleNotFoundError as missing:
            raise ImportError(f"{missing.name} is not installed: {install_command('worker')}") from None
    # A worker, and a decoder child above all, should not pay for the producer.
    if name != "__all__" and (name.startswith("_") or name not in import_module("keye.producer").__all__):
        raise AttributeError(f"module 'keye' has no attribute {name!r}")
    return getattr(import_module("keye.producer"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), "Analyzer", *import_module("keye.producer").__all__})
