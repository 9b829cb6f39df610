"""An nvidia-smi that lists cards which are not there."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Card(NamedTuple):
    """`mig_mode` is `[N/A]` of a card that cannot be cut; `instances` are UUIDs."""

    uuid: str
    mig_mode: str = "Disabled"
    instances: Sequence[str] = ()


def write_nvidia_smi(folder: Path, *cards: Card) -> None:
    """To be put on PATH before any real one."""
    modes = [f"{number}, {card.uuid}, {card.mig_mode}" for number, card in enumerate(cards)]
    listed = []
    for number, card in enumerate(cards):
        listed.append(f"GPU {number}: NVIDIA A100-SXM4-40GB (UUID: {card.uuid})")
        listed += [f"  MIG 3g.20gb     Device  {place}: (UUID: {uuid})" for place, uuid in enumerate(card.instances)]
    queries = [*_case("-L", listed), *_case("--query-gpu=index,uuid,mig.mode.current", modes)]
    command = folder / "nvidia-smi"
    command.write_text("\n".join(["#!/bin/sh", "case $1 in", *queries, "*) exit 2 ;;", "esac", ""]))
    command.chmod(0o755)


def _case(argument: str, answer: Sequence[str]) -> list[str]:
    return [f"{argument})", *(f"echo '{line}'" for line in answer), ";;"]
