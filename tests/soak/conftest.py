"""A fleet as operators have it, over more time than a test has."""

from tests.acceptance.conftest import checkpoint, start
from tests.chaos.conftest import broker

__all__ = ["broker", "checkpoint", "start"]
