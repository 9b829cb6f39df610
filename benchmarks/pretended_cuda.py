"""A pretended GPU: the worker's own code on CUDA tensors of torch's FakeTensorMode, which have shapes and no numbers.

Needs neither a GPU nor its memory. What a GPU would refuse raises, and what it would do or wait for is counted. Every
number read from it is 0.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import varlen  # noqa: F401  # registers the kernel's operation
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from keye import worker
from keye.worker.engine import graph_capture
from keye.worker.model import attention_choice, paged_attention, rotary

# An H100.
CAPABILITY, NUM_MULTIPROCESSORS = (9, 0), 132

_aten = torch.ops.aten
_VARLEN = torch.ops.torch_attn._varlen_attn.default
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_)
# They launch nothing, as views do not.
_FREE = (
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten._unsafe_view,
)
_ROOT = f"{Path(worker.__file__).parent}/"


class RefusedByDevice(BaseException):
    """A GPU would have raised, or have given wrong numbers.

    No `Exception`, of which the engine makes a failed job, or two halves of a step that pass.
    """


@dataclass
class Tally:
    """Operations by name, without views; copies from the host; and all that waits for the device, copies among it.

    Copies and waits tell how many bytes, and the lines that asked for them.
    """

    operations: Counter[str] = field(default_factory=Counter)
    copies: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def num_operations(self) -> int:
        return self.operations.total()


class PretendedCuda(TorchDispatchMode):
    """Sees each operation before FakeTensorMode does. What is on the host is computed there, as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.recordings: list[Tally] = []
        """Of each captured step, in order, what is in its graph."""
        self._tally = Tally()
        self._is_capturing = False
        # Kept, so that no other memory gets their addresses.
        self._pinned: dict[int, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[Tally]:
        """What is done within goes into this tally alone."""
        outer, self._tally = self._tally, Tally()
        try:
            yield self._tally
        finally:
            self._tally = outer

    def record(self, run: graph_capture.Replay) -> graph_capture.Replay:
        """In place of `CudaRecorder`. The first time it runs freely before: then a GPU refuses what first times do."""
        if not self.recordings:
            run()
        with self.counting() as tally:
            self._is_capturing = True
            try:
                output = run()
            finally:
                self._is_capturing = False
        self.recordings.append(tally)
        return lambda: output

    def read(self, tensor: Tensor) -> Tensor:
        """A copy on the host."""
        self._wait(f"reads {tensor.nbytes} bytes")
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():
            # There, what is made up of other operations comes as one.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        makes_on_device = device is not None and torch.device(device).type == "cuda"
        if not makes_on_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_host(func, args, kwargs)
        packet = func.overloadpacket
        if packet is _aten._to_copy or packet is _aten.copy_:
            source, is_there = tensors[-1], isinstance(tensors[-1], FakeTensor)
            goes_there = isinstance(tensors[0], FakeTensor) if device is None else makes_on_device
            if goes_there and not is_there:
                self._copy(source, kwargs.get("non_blocking", len(args) > 2 and args[2]))
                return func(*args, **kwargs)
            if is_there and not goes_there:
                with unset_fake_temporarily():
                    return func(*(self.read(x) if x is source else x for x in args), **kwargs)
        if packet is _aten._local_scalar_dense:
            with unset_fake_temporarily():
                return self.read(tensors[0]).item()
        if packet in _INDEXING:
            args = (args[0], tree_map(self._as_index, args[1]), *args[2:])
        else:
            # Of a pattern for a new tensor, only the shape is looked at.
            if not makes_on_device:
                _require_no_host_tensor(packet, tensors)
            if torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
                self._wait(f"{packet} depends on numbers")
            if func is _VARLEN:
                names = (argument.name for argument in func._schema.arguments)
                _check_kernel(**dict(zip(names, args, strict=False)) | kwargs)
        output = func(*args, **kwargs)
        # A kernel is not launched for nothing.
        if (
            not func.is_view
            and packet not in _FREE
            and any(isinstance(x, Tensor) and x.numel() for x in tree_leaves(output))
        ):
            self._tally.operations[packet.__name__] += 1
        return output

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is _aten.is_pinned.default:
            return _address(args[0]) in self._pinned
        with unset_fake_temporarily():
            if func is _aten._pin_memory.default:
                return self._pin(args[0].clone())
            is_pinned = kwargs.pop("pin_memory", None)
            output = func(*args, **kwargs)
            return self._pin(output) if is_pinned else output

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[_address(tensor)] = tensor
        return tensor

    def _copy(self, tensor: Tensor, non_blocking: bool) -> None:
        if not tensor.numel():
            return
        if not (non_blocking and _address(tensor) in self._pinned):
            self._wait(f"copies {tensor.nbytes} bytes to the device")
        self._tally.copies.append(f"{tensor.nbytes} bytes: {_lines()}")

    def _wait(self, what: str) -> None:
        if self._is_capturing:
            raise RefusedByDevice(f"{what} while a step is captured: {_lines()}")
        self._tally.waits.append(f"{what}: {_lines()}")

    def _as_index(self, index: Any) -> Any:
        if not isinstance(index, Tensor):
            return index
        if index.dtype in (torch.bool, torch.uint8):
            self._wait("counts the rows of a mask")
        if isinstance(index, FakeTensor):
            return index
        self._copy(index, non_blocking=False)
        return torch.empty(index.shape, dtype=index.dtype, device="cuda")


def _check_kernel(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    **others: Any,
) -> None:
    """What FlashAttention-2 asks of a call with packed queries, as `mha_varlen_fwd` of torch's flash_api.cpp has it.

    Its own checks, and one that it lacks: pytorch issue 194167.
    """
    num, heads, head_dim = len(cu_seq_q) - 1, query.shape[1], query.shape[-1]
    kv_heads = key.shape[-2]
    borders = [border for border in (cu_seq_q, cu_seq_k, seqused_k) if border is not None]
    _require(query.dtype in (torch.bfloat16, torch.float16), f"numbers in {query.dtype}")
    _require(query.dtype == key.dtype == value.dtype, "queries, keys and values of several types")
    _require(all(x.stride(-1) == 1 for x in (query, key, value)), "heads that are not contiguous")
    _require(head_dim % 8 == 0 and head_dim <= 256, f"heads of {head_dim}")
    _require(heads == kv_heads or (enable_gqa and heads % kv_heads == 0), f"{heads} heads over {kv_heads}")
    _require(key.shape == value.shape and key.shape[-1] == head_dim, f"keys {key.shape}, values {value.shape}")
    _require(all(x.dtype == torch.int32 and x.is_contiguous() for x in borders), "borders that are not packed int32")
    _require(cu_seq_k.shape == (num + 1,), f"borders of {num} and of {len(cu_seq_k) - 1} sequences")
    _require(seqused_k is None or seqused_k.shape == (num,), f"another number of lengths than {num}")
    _require(num <= len(query) <= num * max_q, f"{len(query)} queries of {num} sequences of at most {max_q}")
    if block_table is None:
        goes_to_cudnn = max_q > 128 and window_size in (None, [-1, -1]) and heads == kv_heads and not enable_gqa
        _require(
            not goes_to_cudnn, "what torch 2.14 gives to cuDNN, which plans each new shape for tens of milliseconds"
        )
        _require(key.dim() == 3 and len(key) <= num * max_k, f"keys {key.shape} of {num} sequences of at most {max_k}")
        return
    _require(seqused_k is not None, "block tables without lengths")
    _require(block_table.dtype == torch.int32 and block_table.stride(-1) == 1, "block tables that are no int32 rows")
    _require(
        block_table.dim() == 2 and len(block_table) == num, f"block tables {block_table.shape} for {num} sequences"
    )
    _require(key.dim() == 4 and key.shape[1] % 256 == 0, f"blocks of {key.shape[1]} tokens")
    _require(max_k <= block_table.shape[1] * key.shape[1], f"{max_k} keys in tables of {block_table.shape[1]} blocks")
    # Then each sequence is a row of its own, its queries the heads that share a key head, and strides are right.
    is_packed_decoding = max_q == 1 and heads > kv_heads and window_size in (None, [-1, -1])
    # A torch whose operation cannot be told does not split.
    if "num_splits" not in (argument.name for argument in _VARLEN._schema.arguments) or is_packed_decoding or num == 1:
        return
    num_splits = others.get("num_splits") or _choose_splits(num * heads, head_dim, max_q, max_k)
    _require(num_splits == 1, f"{num_splits} splits of {num} sequences, all but the first of which stay unwritten")


def _attend_densely(query: Tensor, *others: Tensor, enable_gqa: bool = False, **options: Any) -> Tensor:
    """The kernels for float32 and before Ampere share no key heads; the whole matrix is written out without them."""
    _require(not enable_gqa or query.device.type == "cpu", "key heads to share, which CUDA's kernels refuse")
    return scaled_dot_product_attention(query, *others, enable_gqa=enable_gqa, **options)


def _choose_splits(num_heads: int, head_dim: int, max_q: int, max_k: int) -> int:
    """In how many parts the kernel shares the keys out, as `num_splits_heuristic` of flash_api.cpp decides.

    The fewest that keep the chip 85 % as busy as it can be kept; one where it nearly is busy as it is.
    """
    num_places = 2 * NUM_MULTIPROCESSORS
    num_key_blocks = ceil(max_k / (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
    work = num_heads * ceil(max_q / 64)
    if work >= 0.8 * num_places:
        return 1
    busy = {}
    for num in range(1, min(128, num_places, num_key_blocks) + 1):
        # Others share out the same number of blocks as one part fewer does.
        if num == 1 or ceil(num_key_blocks / num) != ceil(num_key_blocks / (num - 1)):
            waves = work * num / num_places
            busy[num] = waves / ceil(waves)
    return next(num for num, share in busy.items() if share >= 0.85 * max(busy.values()))


def _require_no_host_tensor(packet: Any, tensors: list[Tensor]) -> None:
    """A tensor of no dimension may lie anywhere: its number goes along with the launch."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.dim():
            raise RefusedByDevice(f"{packet} on the device is given a tensor of the host: {_lines()}")


def _require(is_met: bool, otherwise: str) -> None:
    if not is_met:
        raise RefusedByDevice(f"the attention kernel is given {otherwise}: {_lines()}")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _lines() -> str:
    """The innermost two lines of the worker's own."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_ROOT)]
    return " < ".join(f"{frame.filename.removeprefix(_ROOT)}:{frame.lineno}" for frame in reversed(frames[-2:]))


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Within, "cuda" is a pretended H100, for this thread."""
    cuda = PretendedCuda()
    # What they keep for a device is of this pretence alone.
    kept: tuple[Callable[..., Any], ...] = (rotary._section_rows, rotary._inverse_frequencies)
    for function in kept:
        function.cache_clear()
    try:
        with (
            patch.object(torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
            patch.object(FakeTensor, "tolist", lambda tensor: cuda.read(tensor).tolist()),
            # All forms give zeros, and would be found wrong.
            patch.object(attention_choice, "_fault", lambda _: None),
            patch.object(paged_attention, "scaled_dot_product_attention", _attend_densely),
            patch.object(graph_capture, "CudaRecorder", lambda: cuda.record),
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
            cuda,
        ):
            yield cuda
    finally:
        for function in kept:
            function.cache_clear()
