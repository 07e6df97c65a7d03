"""What an adapter passes to `attend`, and whether it does what its module does."""

from collections.abc import Callable

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.replace.slot.context import tensors_of


def check_call(
    adapter: str,
    q: object,
    k: object,
    v: object,
    causal: object,
    key_padding_mask: object,
    scale: object,
    sizes: tuple[int, int, int] | None,
) -> None:
    """The arguments of `attend` are what it says, and fit `sizes` (H, Hkv, D) of the codebook if there is one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, x, dims in (("q", q, "B H L D"), ("k", k, "B Hkv L D"), ("v", v, "B Hkv L E")):
        check.tensor(adapter, name, x, dims)
        check.real(adapter, name, x)
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if sizes is not None and (heads, kv_heads, dim) != sizes:
        raise ValueError(
            f"{adapter}: q and k must have (H, Hkv, D) = {sizes} like the module's codebook, got "
            f"{(heads, kv_heads, dim)}"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{adapter}: the heads H of q must be a multiple of those of k, got {heads} and {kv_heads}")
    check.size(adapter, "k", k, (batch, kv_heads, k.shape[2], dim), "B Hkv L D")
    check.size(adapter, "v", v, (batch, kv_heads, k.shape[2], v.shape[3]), "B Hkv L E")
    if k.shape[2] != length:
        raise NotImplementedError(
            f"{adapter}: got {length} queries for {k.shape[2]} keys, expected as many: cross-attention and caches "
            "can't be replaced"
        )
    check.same_device(adapter, "q", q, k=k, v=v)
    check.flags(adapter, causal=causal)
    if key_padding_mask is not None:
        check.key_padding_mask(adapter, key_padding_mask, batch, length)
        check.same_device(adapter, "q", q, key_padding_mask=key_padding_mask)
    if scale is not None:
        check.number(adapter, "scale", scale)


def check_output(
    adapter: str,
    expected: Callable[[], object],
    got: object,
    without: Callable[[], object],
    calls: list[tuple[torch.dtype, Tensor | None]],
) -> None:
    """With attention to every key the adapter returns what its module does, but for padded positions.

    Args:
        expected: calls the module itself.
        got: what the adapter returned.
        without: calls the adapter with attention that gives zeros: what is left is no part of the attention's size.
        calls: dtype of the queries and key_padding_mask of every call of `attend`.

    Raises:
        ValueError: it doesn't.
    """
    own = _first_tensor(expected())
    got = _first_tensor(got)
    if own is None or got is None:
        if (own is None) != (got is None):
            raise ValueError(f"{adapter}: returns {_kind(got)}, expected {_kind(own)} as the module itself does")
        return
    if own.shape != got.shape:
        raise ValueError(
            f"{adapter}: returns shape {tuple(got.shape)}, expected {tuple(own.shape)} as the module itself does"
        )
    places = _real_positions([padding for _, padding in calls], tuple(own.shape))
    if not places:
        return  # nobody knows where in this shape the padding is
    zero = _first_tensor(without())
    sizes = [_norm(got - zero, real) for real in places]
    tolerance = max(_tolerance(dtype) for dtype in (got.dtype, *(dtype for dtype, _ in calls)))
    rounding = 8 * torch.finfo(got.dtype).eps
    allowed = [tolerance * size + rounding * _norm(own, real) for size, real in zip(sizes, places, strict=True)]

    def equal(x: Tensor) -> bool:
        return any(_norm(x - own, real) <= most for real, most in zip(places, allowed, strict=True))

    if equal(got) or not equal(_first_tensor(expected())):  # or it never returns the same twice
        return
    error = min(_norm(got - own, real) / max(size, 1e-30) for real, size in zip(places, sizes, strict=True))
    raise ValueError(
        f"{adapter}: with attention to every key its output differs from the module's own by {error:.2g} of what "
        "attention adds to it; look at its projections and at the causal, key_padding_mask and scale that it passes to "
        "attend. If the module does something else on purpose, call register_adapter(..., check=False)"
    )


def _real_positions(paddings: list, shape: tuple[int, ...]) -> list[Tensor | None]:
    # Where an output of that shape has tokens, as masks of its first axes; None: everywhere. Length may come first.
    given = [padding for padding in paddings if padding is not None]
    if not any(bool(padding.any()) for padding in given):
        return [None]
    if len(given) < len(paddings) or len({padding.shape[1] for padding in paddings}) > 1:
        return []
    real = ~torch.cat(paddings)
    found = (real, real.T, real.flatten(), real.T.flatten())
    return [mask for mask in found if tuple(mask.shape) == shape[: mask.dim()]]


def _norm(x: Tensor, real: Tensor | None) -> float:
    return float(torch.linalg.vector_norm((x if real is None else x[real]).double()))


def _tolerance(dtype: torch.dtype) -> float:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set in torch's newer way, per backend
        precision = "high"
    if dtype not in (torch.float32, torch.float64) or precision == "medium":
        return 0.05
    return 1e-3 if precision == "highest" else 0.01


def _first_tensor(output: object) -> Tensor | None:
    # The output of the attention comes first, whatever else comes with it.
    return next(iter(tensors_of(output)), None)


def _kind(x: object) -> str:
    return "a tensor" if isinstance(x, Tensor) else "no tensor"
