"""`from keye.testing import MemoryClient`: see `keye.producer.testing`."""

from keye.producer.testing import MemoryClient

__all__ = ["MemoryClient"]
