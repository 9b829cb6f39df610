"""What is in a block of the key-value cache, told by a digest: tokens, where they stand, media, and all before them."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from keye.worker.engine.block_pool import BlockKey
from keye.worker.engine.visual_rows import VisualRows
from keye.worker.model.processor import PreparedPrompt


class BlockKeys:
    """Keys of a sequence's full blocks: those of its prompt, and of what is generated as it fills them.

    Two blocks of one key hold the same keys and values: a key is a digest over the one before, ids and positions
    [4, block_size], and the pixels of all media that have a row in the block. A caller chooses what is digested, but no
    digest.
    """

    def __init__(self, prompt: PreparedPrompt, media: Iterable[VisualRows], block_size: int) -> None:
        """For the thread of the job: of a long prompt it takes milliseconds."""
        self.keys: list[BlockKey] = []
        self._block_size = block_size
        self._num_prompt_tokens = len(prompt.input_ids)
        self._rope_delta = prompt.rope_delta
        self._root = blake2b(prompt.salt, digest_size=32).digest()
        tokens = np.concatenate([prompt.input_ids.numpy()[np.newaxis], prompt.position_ids.numpy()])
        self._seen: dict[int, bytes] = {}
        for rows in media:
            for block, item_key in rows.keys_in_blocks(block_size):
                self._seen[block] = self._seen.get(block, b"") + item_key
        for start in range(0, self._num_prompt_tokens - block_size + 1, block_size):
            self._add(tokens[:, start : start + block_size])
        self._rest = tokens[:, len(self.keys) * block_size :].copy()

    def extend(self, generated_ids: list[int], num_blocks: int) -> None:
        """Of so many blocks, all full, the keys are to be known; `generated_ids` are all so far."""
        while len(self.keys) < num_blocks:
            start = len(self.keys) * self._block_size
            given = self._rest if start < self._num_prompt_tokens else self._rest[:, :0]
            places = np.arange(start + given.shape[1], start + self._block_size)
            first, last = places[[0, -1]] - self._num_prompt_tokens
            stand_at = places + self._rope_delta
            written = np.stack([np.array(generated_ids[first : last + 1]), stand_at, stand_at, stand_at])
            self._add(np.concatenate([given, written], axis=1))

    def _add(self, tokens: np.ndarray) -> None:
        before = self.keys[-1] if self.keys else self._root
        seen = self._seen.get(len(self.keys), b"")
        self.keys.append(blake2b(before + tokens.astype(np.int64).tobytes() + seen, digest_size=32).digest())
