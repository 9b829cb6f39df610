"""Included in a worker, this has its GPU be the CPU; GPU-broken is one that no model gets onto."""

import os

import torch

from keye.config.codes import DeviceSetting
from keye.worker.model import device


def find_device(_: DeviceSetting) -> torch.device:
    if os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-broken":
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return torch.device("cpu")


device.choose_device = find_device
