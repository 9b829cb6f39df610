"""Whose the blocks of the key-value cache are, and what they hold. Touches no tensors."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

BlockKey = bytes
"""Says what a full block holds, and all before it: see `block_keys.py`."""


class BlockPool:
    """Blocks numbered 0 to num_blocks - 1, each of which any number of sequences may hold at once.

    One that nobody holds any more is free; if it was published it can be found by its key until it is taken for
    something else, which is done to the least recently held first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks))
        # In the order in which they were let go. A plain dictionary finds its first ever slower as they are taken out.
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self._published: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._unheld)

    def is_published(self, key: BlockKey) -> bool:
        return key in self._published

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of as many keys, from the first on, as are published."""
        found = []
        for key in keys:
            if (block := self._published.get(key)) is None:
                break
            found.append(block)
        return found

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of them are free, and would be no more if they were held."""
        return sum(block in self._unheld for block in blocks)

    def num_freed(self, tables: Iterable[Sequence[int]]) -> int:
        """How many blocks would become free if so many sequences gave theirs back."""
        given_back = Counter(chain.from_iterable(tables))
        return sum(self._num_holders[block] == number for block, number in given_back.items())

    def hold(self, blocks: Sequence[int]) -> None:
        """For one more sequence, blocks that were found."""
        for block in blocks:
            self._unheld.pop(block, None)
            self._num_holders[block] += 1

    def take(self, num_blocks: int) -> list[int]:
        """Blocks that nobody else holds or finds.

        Raises `ValueError` when so many are not free: the plan of the step has to see to it.
        """
        if num_blocks > self.num_free:
            raise ValueError(f"{num_blocks} blocks are asked for, {self.num_free} of {self.num_blocks} are free")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(num_blocks)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def give_back(self, blocks: Sequence[int]) -> list[int]:
        """What a sequence held. Returns those that hold nothing any more for anybody."""
        blank = []
        # Its end first: a beginning is found more often, and without it nothing is.
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                if block in self._keys:
                    self._unheld[block] = None
                else:
                    blank.append(block)
        self._blank += blank
        return blank

    def publish(self, block: int, key: BlockKey) -> None:
        """From now on nobody may write to it. Where another block holds the same, that one is found."""
        if block not in self._keys and key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def _evict(self) -> int:
        block, _ = self._unheld.popitem(last=False)
        del self._published[self._keys.pop(block)]
        return block
