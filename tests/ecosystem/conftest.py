"""Other people's programs beside a real worker: what compose, containers, Prometheus and Flower make of it."""

from tests.acceptance.conftest import checkpoint, start

__all__ = ["checkpoint", "start"]
