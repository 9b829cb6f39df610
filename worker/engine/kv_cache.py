"""The memory of the paged key-value cache, and how much of it a number of bytes buys. Who owns a block is not known."""

import torch

from keye.worker.model.configuration_keye import KeyeConfig


def block_bytes(config: KeyeConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one block takes in all layers together."""
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KVCache:
    """For each layer, keys and values [num_blocks + 1, block_size, kv_heads, head_dim].

    The block behind the others is nobody's: rows that only fill a batch up write and read there.
    """

    def __init__(
        self, config: KeyeConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.block_size = block_size
        shape = (num_blocks + 1, block_size, config.num_key_value_heads, config.head_dim)
        # Zeros, not whatever lay there: a masked slot is multiplied by 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def wipe(self, blocks: list[int]) -> None:
        """Take out numbers that are not finite before another sequence gets the blocks."""
        for layer in (*self.keys, *self.values):
            layer[torch.tensor(blocks, device=layer.device)] = 0
