"""Which GPUs of this host get a worker each: as the operator names them, else as the driver lists them.

Asks nvidia-smi: a parent that touched CUDA would spoil its children's pinning.
"""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from keye.config.codes import DeviceSetting


class WrongGpus(Exception):
    """What `--gpus` names is not there, or named twice; all faults at once."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as nvidia-smi numbers it. One with MIG enabled computes in its `instances` only, and may have none."""

    index: str
    uuid: str
    has_mig: bool
    instances: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.index} ({', '.join((self.uuid, *self.instances))})"

    @property
    def devices(self) -> list[str]:
        return list(self.instances) if self.has_mig else [self.uuid]


def visible_gpus(device: DeviceSetting, environ: Mapping[str, str], asked: str | None = None) -> list[str]:
    """One value of CUDA_VISIBLE_DEVICES for each child: which GPUs get a worker. Empty means one child on the CPU.

    What was `asked` for (`choose_gpus`) wins. Else an operator's own CUDA_VISIBLE_DEVICES is taken at its word; without
    one, every card that nvidia-smi lists, or its MIG instances where it is cut into some. Raises `WrongGpus`.
    """
    if asked is not None:
        if device == "cpu":
            raise WrongGpus(f"--gpus is {asked} and KEYE_DEVICE is cpu. Leave one of them out.")
        return choose_gpus(asked, list_cards())
    if device == "cpu":
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [gpu for card in list_cards() for gpu in card.devices]
    # As CUDA reads it: a negative index ends the list.
    gpus = filter(None, map(str.strip, chosen.split(",")))
    return list(takewhile(lambda gpu: not gpu.startswith("-"), gpus))


def choose_gpus(asked: str, cards: Sequence[Card]) -> list[str]:
    """UUIDs of what is `asked` for: `all`, or indices, UUIDs and MIG UUIDs joined by commas, in that order.

    An index is that of nvidia-smi, a UUID may be cut short as far as it is the only such, and a card that is cut by MIG
    stands for all its instances. Raises `WrongGpus`.
    """
    there = f"nvidia-smi lists {', '.join(map(str, cards)) or 'none'}"
    if asked.strip() == "all":
        if gpus := [gpu for card in cards for gpu in card.devices]:
            return gpus
        raise WrongGpus(f"--gpus is all and there is no GPU to use: {there}. Run nvidia-smi, which may say why.")
    chosen: dict[str, str] = {}
    faults: list[str] = []
    for name in map(str.strip, asked.split(",")):
        gpus, fault = _find(name, cards)
        faults += filter(None, [fault])
        for gpu in gpus:
            if gpu in chosen:
                faults.append(f"{name} names {gpu}, which {chosen[gpu]} has named: name each GPU once")
            chosen.setdefault(gpu, name)
    if faults:
        raise WrongGpus(f"--gpus: {'; '.join(faults)}. {there}.")
    return list(chosen)


def _find(name: str, cards: Sequence[Card]) -> tuple[list[str], str | None]:
    """The UUIDs that a name stands for, or what is wrong with it."""
    uuids = [uuid for card in cards for uuid in (card.uuid, *card.instances)]
    # The whole name first: one instance's may begin with another's.
    found = [uuid for uuid in uuids if uuid == name] or [uuid for uuid in uuids if uuid.startswith(name)]
    named = [card for card in cards if name == card.index or [card.uuid] == found]
    if named:
        return named[0].devices, None if named[0].devices else f"GPU {name} has MIG enabled and no instance"
    if not name.startswith(("GPU-", "MIG-")) or not found:
        return [], f"no such GPU: {name or '(nothing)'}"
    return found[:1], None if len(found) == 1 else f"{name} may be any of {', '.join(found)}"


def list_cards() -> list[Card]:
    """Their UUIDs stay true when a container or a reboot numbers them anew. None where there is no driver."""
    instances = _instances_by_card(_ask_driver("-L"))
    rows = _ask_driver("--query-gpu=index,uuid,mig.mode.current", "--format=csv,noheader")
    fields = ([field.strip() for field in row.split(",")] for row in rows)
    return [Card(index, uuid, mode == "Enabled", instances[uuid]) for index, uuid, mode in fields]


def _instances_by_card(lines: Iterable[str]) -> defaultdict[str, list[str]]:
    """UUIDs of MIG instances, each below its card's line: `  MIG 3g.20gb  Device  0: (UUID: MIG-…)`."""
    instances = defaultdict[str, list[str]](list)
    card = ""
    for line in lines:
        if found := re.search(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", line):
            if found[1].startswith("GPU-"):
                card = found[1]
            else:
                instances[card].append(found[1])
    return instances


def _ask_driver(*arguments: str) -> list[str]:
    """Lines of nvidia-smi; none where there is no driver, or one that does not answer."""
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []
