"""A device that has little memory."""

from typing import Any

import pytest
import torch

from keye.worker.engine.step_loop import Engine


class SmallDevice:
    """Stands for a device whose memory holds the work of so many tokens a forward pass, and no more."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
        self._forward = engine._runner._model.model.forward
        self._max_tokens = max_tokens
        monkeypatch.setattr(engine._runner._model.model, "forward", self)

    def __call__(self, embeds: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if embeds.shape[1] > self._max_tokens:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return self._forward(embeds, *args, **kwargs)
