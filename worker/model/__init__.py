"""Keye-VL: text and pixels to logits. Knows nothing of queues, leases or media files."""

import logging

# Where torchao is installed transformers imports it, and torch tells of deprecations inside it at each start.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
