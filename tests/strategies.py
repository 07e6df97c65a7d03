"""Hypothesis strategies: complete, valid calls of the operators, drawn over shapes, options, strides and extremes."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


def layout(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "transposed":  # as after a projection: memory (B, L, H, D), viewed as (B, H, L, D)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":  # a view into a larger buffer
        padded = x.new_zeros([n + 1 for n in x.shape])
        view = padded[tuple(slice(1, None) for _ in x.shape)]
        view.copy_(x)
        return view
    return x.contiguous()


LAYOUTS = ("contiguous", "transposed", "sliced")


@st.composite
def offsets(draw, length: int) -> Tensor:
    """``cu_seqlens`` of a row, with documents of any length: empty, a single step, or the whole row."""
    if length == 0 and draw(st.booleans()):
        return torch.zeros(1, dtype=torch.int32)  # no documents
    places = st.one_of(st.integers(0, length), st.sampled_from([0, length, min(length, 1), length // 2]))
    cuts = sorted(draw(st.lists(places, max_size=6)))
    return torch.tensor([0, *cuts, length], dtype=torch.int32)


@dataclass
class AttentionCase:
    """A call of ``vq_attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    codebook: Tensor
    options: dict

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The leaves of the case in ``dtype``, with the same strides."""
        leaves = {"q": self.q, "k": self.k, "v": self.v}
        if self.options["bias"] is not None:
            leaves["bias"] = self.options["bias"]
        return {
            name: torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x).requires_grad_()
            for name, x in leaves.items()
        }


@st.composite
def attention_cases(draw, max_length: int = 200, max_batch: int = 2, packed: bool = False) -> AttentionCase:
    """Any valid call of ``vq_attention`` in float64; ``packed``: with one row and ``cu_seqlens``."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = 1 if packed else draw(st.integers(0, max_batch))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = draw(st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 129]), st.integers(0, max_length)))
    head_dim, value_dim = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 5, 8]))
    num_codes = draw(st.sampled_from([1, 2, 7, 32, 150]))
    window = draw(st.one_of(st.sampled_from([0, 1, 2, 64]), st.integers(0, max_length + 10)))
    causal = draw(st.booleans())
    magnitude = draw(st.sampled_from([1e-3, 1.0, 1.0, 30.0]))

    q = torch.randn(batch, kv_heads * group, length, head_dim, dtype=torch.float64) * magnitude
    k = torch.randn(batch, kv_heads, length, head_dim, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, value_dim, dtype=torch.float64)
    codebook = torch.randn(kv_heads, num_codes, head_dim, dtype=torch.float64)
    special = draw(st.sampled_from(["none", "none", "one code", "unused codes", "equal keys", "equal codes"]))
    if special == "one code":  # all keys are nearest to code 0
        codebook += 100
        codebook[:, 0] = 0
    elif special == "unused codes":
        codebook[:, 1:] += 1e4
    elif special == "equal keys":
        k[:] = 0.5
    elif special == "equal codes":
        codebook[:] = codebook[:, :1]

    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length) < draw(st.sampled_from([0.1, 0.6]))
        if batch and draw(st.booleans()):
            mask[0] = True  # a row without allowed keys
    bias = None
    if window and draw(st.booleans()):
        bias = torch.randn(kv_heads * group, window if causal else 2 * window - 1, dtype=torch.float64)
    activation = draw(st.sampled_from(["softmax", "softmax", "laplace"]))
    options = {
        "causal": causal,
        "window": window,
        "bias": bias,
        "key_padding_mask": mask,
        "scale": draw(st.sampled_from([None, 0.3])) if activation == "softmax" else None,
        "activation": activation,
        "local_keys": draw(st.sampled_from(["quantized", "exact"])),
        "key_grad": draw(st.sampled_from(["cluster", "window"])),
    }
    if packed:
        options["cu_seqlens"] = draw(offsets(length))
    kind = draw(st.sampled_from(LAYOUTS))
    return AttentionCase(layout(q, kind), layout(k, kind), layout(v, kind), codebook, options)


@dataclass
class ScanCase:
    """A call of ``ssm_scan``."""

    u: Tensor
    log_decay: Tensor
    weight: Tensor
    skip: Tensor | None
    initial_state: Tensor | None
    options: dict

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The leaves of the case, with the same strides; parameters are at least float32."""
        precise = torch.promote_types(dtype, torch.float32)
        complex_of = {torch.float32: torch.complex64, torch.float64: torch.complex128}
        leaves = {"u": self.u.to(dtype)}
        for name in ("log_decay", "weight", "skip", "initial_state"):
            x = getattr(self, name)
            if x is not None:
                leaves[name] = x.to(complex_of[precise] if x.is_complex() else precise)
        return {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x).requires_grad_()
            for name, x in leaves.items()
        }


@st.composite
def scan_cases(draw, max_length: int = 200, packed: bool = False) -> ScanCase:
    """Any valid call of ``ssm_scan`` in float64; ``packed``: with one row and ``cu_seqlens``."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = 1 if packed else draw(st.integers(0, 2))
    channels = draw(st.sampled_from([1, 2, 3, 3, 17]))
    modes = draw(st.sampled_from([1, 2, 5]))
    length = draw(st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 129]), st.integers(0, max_length)))
    family = draw(st.sampled_from([torch.float64, torch.complex128]))
    # From decays of almost 1 to decays of almost 0.
    log_decay = -torch.rand(channels, modes, dtype=torch.float64) * draw(st.sampled_from([1e-8, 1e-2, 1.0, 50.0]))
    if family.is_complex:
        log_decay = torch.complex(log_decay, torch.randn(channels, modes, dtype=torch.float64) * 3)
    weight = torch.randn(channels, modes, dtype=family)
    skip = torch.randn(channels, dtype=torch.float64) if draw(st.booleans()) else None
    cu_seqlens = draw(offsets(length)) if packed else None
    rows = len(cu_seqlens) - 1 if packed else batch
    state = torch.randn(rows, channels, modes, dtype=family) if draw(st.booleans()) else None
    u = torch.randn(batch, length, channels, dtype=torch.float64)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length) < draw(st.sampled_from([0.1, 0.6]))
    options = {"key_padding_mask": mask, "cu_seqlens": cu_seqlens, "reverse": draw(st.booleans())}
    return ScanCase(layout(u, draw(st.sampled_from(LAYOUTS))), log_decay, weight, skip, state, options)


@dataclass
class NativeScanCase:
    """A call of ``ssm_scan`` in dtypes and layouts that the compiled kernel takes, and gradients of its results."""

    arguments: dict[str, Tensor]
    options: dict
    grad_y: Tensor
    grad_state: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_() for name, x in self.arguments.items()}

    def plain_leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Contiguous leaves with the same values in ``dtype``, float32 or float64."""
        return {name: in_precision(x, dtype).requires_grad_() for name, x in self.arguments.items()}


def in_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in ``dtype``, or its complex counterpart if ``x`` is complex."""
    return x.detach().resolve_conj().to(dtype.to_complex() if x.is_complex() else dtype).clone().contiguous()


def any_layout(draw, x: Tensor, kinds: tuple[str, ...] = ()) -> Tensor:
    """``x`` with other strides. An expanded axis repeats the values of its first index."""
    kinds = (*kinds, "contiguous", "contiguous", "transposed", "sliced", "strided")
    kind = draw(st.sampled_from((*kinds, "conjugated") if x.is_complex() else kinds))
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x
    if kind == "sliced":
        return layout(x, kind)
    if kind == "strided":
        buffer = x.new_zeros([2 * n for n in x.shape])
        view = buffer[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if kind == "conjugated":  # a lazy conjugate: the bit is set, the memory holds the conjugate
        return x.conj().resolve_conj().conj()
    if kind.startswith("expanded"):
        axis = int(kind.removeprefix("expanded"))
        return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)
    return x.contiguous()


_EXPANDED = ("expanded0", "expanded2", "expanded1")  # along the batch, the channels, time


@st.composite
def native_scan_cases(
    draw, dtype: torch.dtype = torch.float32, max_length: int = 100, packed: bool = False
) -> NativeScanCase:
    """Shapes around the 16 channels of a line, the 32 or 64 steps of a chunk, the panels of modes; every layout."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = 1 if packed else draw(st.integers(0, 3))
    channels = draw(st.sampled_from([3, 1, 2, 15, 16, 17, 33]))
    modes = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 32]))
    length = draw(st.one_of(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65]), st.integers(0, max_length)))
    family = draw(st.sampled_from([torch.complex64, torch.float32]))
    log_decay = -torch.rand(channels, modes) * draw(st.sampled_from([1.0, 1e-8, 1e-3, 50.0]))
    if draw(st.booleans()):  # different decays in one channel
        log_decay *= torch.tensor([1.0, 1e-3, 1e-8])[torch.randint(3, (channels, modes))]
    if family.is_complex:
        log_decay = torch.complex(log_decay, torch.randn(channels, modes) * draw(st.sampled_from([1.0, 100.0, 1e6])))
    cu_seqlens = draw(offsets(length)) if packed else None
    rows = len(cu_seqlens) - 1 if packed else batch
    arguments = {
        "u": any_layout(draw, torch.randn(batch, length, channels).to(dtype), _EXPANDED),
        "log_decay": any_layout(draw, log_decay),
        "weight": any_layout(draw, torch.randn(channels, modes, dtype=family)),
    }
    if draw(st.booleans()):
        arguments["skip"] = any_layout(draw, torch.randn(channels))
    if draw(st.booleans()):
        arguments["initial_state"] = any_layout(draw, torch.randn(rows, channels, modes, dtype=family), _EXPANDED)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length) < draw(st.sampled_from([0.2, 0.7, 1.0]))
        mask = any_layout(draw, mask, _EXPANDED[:1])
    return NativeScanCase(
        arguments,
        {"key_padding_mask": mask, "cu_seqlens": cu_seqlens, "reverse": draw(st.booleans())},
        any_layout(draw, torch.randn(batch, length, channels).to(dtype), _EXPANDED),
        any_layout(draw, torch.randn(rows, channels, modes, dtype=family), _EXPANDED),
    )
