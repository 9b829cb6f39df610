"""Chooses how a device attends: the fastest form that agrees there with attention written out in float32."""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES, FlexForm, VarlenForm
from keye.worker.model.device import has_packed_kernels
from keye.worker.model.device_faults import is_device_lost
from keye.worker.model.item_attention import EqualItems, ItemForm, VarlenItems
from keye.worker.model.paged_attention import AttentionForm, GatheredForm, KVCache, Span, attend_decoding, attend_spans
from keye.worker.model.text_decoder import Attend

logger = logging.getLogger(__name__)

Form = TypeVar("Form", AttentionForm, ItemForm)

# (queries, keys) of the sequences of a step: decoding alone and beside whole prompts and chunks; and two chunks, of
# which a kernel that splits over the keys of the longer one may leave rows unwritten.
STEPS = (
    ((1, 900), (1, 300), (1, 37), (1, 1)),
    ((1, 300), (1, 2), (60, 60), (5, 259), (30, 1400)),
    ((30, 1400), (60, 60)),
)
ITEM_LENGTHS = ((300, 36, 4, 300, 169), (196, 196))

# Values are 1 at most. Half precision rounds probabilities and outputs, by half an `eps` each; sums are in float32, and
# what their order changes is less than `FINEST_STEP`. Twice all that is accepted.
ACCEPTED_STEPS = 2
FINEST_STEP = 2.0**-16


class NoRightAttention(Exception):
    """No form of attention that the device might run gives the right numbers there."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The forms for sequences and for images, and a sentence on each that had to be passed over."""

    paged: AttentionForm
    items: ItemForm
    refused: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.paged.name}; images: {self.items.name}"


@torch.inference_mode()
def choose_attention(config: KeyeConfig, dtype: torch.dtype, device: torch.device) -> Attention:
    """Tries the forms that might be used, the fastest first, until one is right.

    Raises `NoRightAttention`; `torch.AcceleratorError` where the device is lost.
    """
    trial = _Trial(config, dtype, device)
    paged = paged_forms(config.max_position_embeddings, has_packed_kernels(device, dtype, config.head_dim))
    items: list[ItemForm] = [EqualItems()]
    if has_packed_kernels(device, dtype, trial.item_head_dim):
        items = [VarlenItems(), *items]
    refused: list[str] = []
    right = _first_right(paged, trial.paged_steps, refused), _first_right(items, trial.items, refused)
    return Attention(*right, tuple(refused))


def paged_forms(context: int, has_packed: bool) -> list[AttentionForm]:
    """Those for sequences of at most `context` tokens, the fastest first, with or without packed kernels."""
    if not has_packed:
        return [GatheredForm()]
    return [*([VarlenForm(context)] if HAS_BLOCK_TABLES else []), FlexForm(context), GatheredForm()]


class _Compared(NamedTuple):
    """What a form gave for a step and what it had to give, [rows, heads, head_dim] of the trial's dtype and float32."""

    step: object
    ours: Tensor
    expected: Tensor


def _first_right(forms: Sequence[Form], compare: Callable[[Form], Iterator[_Compared]], refused: list[str]) -> Form:
    """Adds a sentence to `refused` for each form that fails or differs."""
    for form in forms:
        try:
            fault = next(filter(None, map(_fault, compare(form))), None)
        except Exception as error:  # whatever a library says of it, the next form may do without
            if is_device_lost(error):
                raise
            fault = f"does not run here: {type(error).__name__}: {error}"
        if fault is None:
            return form
        refused.append(f"attention by {form.name} {fault}")
        logger.error("%s", refused[-1])
    raise NoRightAttention(
        f"{'; '.join(refused)}. Nothing else is left to try: install the versions of constraints.txt"
    )


def _fault(compared: _Compared) -> str | None:
    step, ours, expected = compared
    accepted = ACCEPTED_STEPS * max(torch.finfo(ours.dtype).eps, FINEST_STEP)
    largest = float((ours.float().cpu() - expected).abs().max())
    # Turned round, so that numbers that are none do not pass.
    if largest <= accepted:
        return None
    return f"is wrong here: off by up to {largest:.2g} in {step}, {accepted:.1g} is accepted"


class _Trial:
    """Small random steps with the heads of a model."""

    def __init__(self, config: KeyeConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = copy(config)
        self._config.num_hidden_layers = 1
        self._item_heads = config.vision_config.num_attention_heads
        self.item_head_dim = config.vision_config.hidden_size // self._item_heads
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def paged_steps(self, form: AttentionForm) -> Iterator[_Compared]:
        """Steps as an engine plans them, then decoding as it is captured, at each width of its tables."""
        for step in STEPS:
            cache, spans, packed, expected = self._step(form, step)
            yield self._attended(f"(queries, keys) {step}", attend_spans(form, cache, spans), packed, expected)
        for width in form.table_widths:
            cache, spans, packed, expected = self._step(form, STEPS[0])
            attend = attend_decoding(form, cache, *cache.tables(spans, width))
            yield self._attended(f"decoding by tables of {width} blocks", attend, packed, expected)

    def items(self, form: ItemForm) -> Iterator[_Compared]:
        for lengths in ITEM_LENGTHS:
            shape = (sum(lengths), self._item_heads, self.item_head_dim)
            query, key, value = self._queries(*shape), self._keys(*shape), self._values(*shape)
            expected = [
                attend_on_paper(*parts, is_causal=False)
                for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            ]
            attend = form.attention(lengths, self._device)
            ours = attend(*(x.to(self._device) for x in (query, key, value)))
            yield _Compared(f"items of {lengths}", ours, torch.cat(expected))

    def _step(
        self, form: AttentionForm, step: Sequence[tuple[int, int]]
    ) -> tuple[KVCache, list[Span], list[Tensor], Tensor]:
        """A cache that holds all but the step's own tokens, its spans, its packed tokens, and the outputs to come."""
        config = self._config
        context = config.max_position_embeddings
        step = [(num_queries, min(num_keys, context)) for num_queries, num_keys in step]
        kv_shape = (config.num_key_value_heads, config.head_dim)
        num_blocks = [-(-num_keys // form.block_size) for _, num_keys in step]
        cache = KVCache(config, sum(num_blocks), form.block_size, self._dtype, self._device)
        blocks = torch.randperm(sum(num_blocks), generator=self._generator).split(num_blocks)
        spans, packed, expected = [], [], []
        for (num_queries, num_keys), own in zip(step, blocks, strict=True):
            query = self._queries(num_queries, config.num_attention_heads, config.head_dim)
            key, value = self._keys(num_keys, *kv_shape), self._values(num_keys, *kv_shape)
            expected.append(attend_on_paper(query, key, value, is_causal=True))
            spans.append(Span(own.tolist(), num_queries, num_keys))
            packed.append((query, key[-num_queries:], value[-num_queries:]))
            if before := num_keys - num_queries:
                slots = cache.slots([Span(own.tolist(), before, before)])
                for paged, tokens in ((cache.keys[0], key), (cache.values[0], value)):
                    paged.flatten(0, 1)[slots] = tokens[:before].to(self._device)
        # Heads before tokens, in a batch of one, as the decoder has them.
        rows = [torch.cat(parts).transpose(0, 1).unsqueeze(0).to(self._device) for parts in zip(*packed, strict=True)]
        return cache, spans, rows, torch.cat(expected)

    def _attended(self, step: str, attend: Attend, packed: Sequence[Tensor], expected: Tensor) -> _Compared:
        query, key, value = packed
        return _Compared(step, attend(0, query, key, value, self._config.head_dim**-0.5)[0], expected)

    def _queries(self, *shape: int) -> Tensor:
        # Twice as long as keys, so that a few of them have most of the weight: a row more or less shows.
        return (2 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def _keys(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)

    def _values(self, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=self._generator) - 1).to(self._dtype)


def attend_on_paper(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """The last queries [n, heads, d] of a sequence over all its keys and values [m, kv_heads, d], in float32.

    Where it is causal, each query sees its own key and those before.
    """
    (num_queries, heads, head_dim), (num_keys, kv_heads, _) = query.shape, key.shape
    key, value = (x.float().repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * head_dim**-0.5
    if is_causal:
        later = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        scores.masked_fill_(later, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)
