"""Counts the blocks of the key-value cache: which are free. The numbers inside them lie in `kv_cache.py`."""


class BlockPool:
    """Hands out block numbers 0 to num_blocks - 1. A block belongs to whoever took it until it is given back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int) -> list[int]:
        """Raises `ValueError` when so many are not free: the plan of the step has to see to it."""
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks are asked for, {len(self._free)} of {self.num_blocks} are free")
        remaining = len(self._free) - num_blocks
        taken = self._free[remaining:]
        del self._free[remaining:]
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(blocks)
