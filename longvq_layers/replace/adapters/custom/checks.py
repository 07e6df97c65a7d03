"""Checks of what an adapter function passes to `attend`, and of what it returns."""

from collections.abc import Callable

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.replace.model_inputs import tensors_in


def check_attend_arguments(
    adapter: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: object,
    key_padding_mask: Tensor | None,
    scale: object,
    sizes: tuple[int, int, int] | None,
) -> None:
    """The arguments of `attend` have the right types and shapes, and fit `sizes` (H, Hkv, D) if these are known.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: another number of queries than of keys.
    """
    for name, x, dims in (("q", q, "B H L D"), ("k", k, "B Hkv L D"), ("v", v, "B Hkv L E")):
        check.tensor(adapter, name, x, dims)
        check.real(adapter, name, x)
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if sizes is not None and (num_heads, num_kv_heads, head_dim) != sizes:
        raise ValueError(
            f"{adapter}: q and k must have (H, Hkv, D) = {sizes} like the module's codebook, got "
            f"{(num_heads, num_kv_heads, head_dim)}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{adapter}: the heads H of q must be a multiple of those of k, got {num_heads} and {num_kv_heads}"
        )
    check.size(adapter, "k", k, (batch, num_kv_heads, k.shape[2], head_dim), "B Hkv L D")
    check.size(adapter, "v", v, (batch, num_kv_heads, k.shape[2], v.shape[3]), "B Hkv L E")
    if k.shape[2] != length:
        raise NotImplementedError(
            f"{adapter}: k must have one key per query, got {length} queries for {k.shape[2]} keys; cross-attention "
            "and caches can't be replaced"
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
    run_module: Callable[[], object],
    output: object,
    run_without_attention: Callable[[], object],
    calls: list[tuple[torch.dtype, Tensor | None]],
) -> None:
    """Check that the adapter, with attention to every key, returns what its module returns, except at padded positions.

    Args:
        run_module: calls the module itself.
        output: what the adapter returned.
        run_without_attention: calls the adapter with attention that gives zeros. Differences are measured against what
            attention adds to this output.
        calls: dtype of the queries and key_padding_mask of every call of `attend`.

    Raises:
        ValueError: the outputs differ.
    """
    expected, got = _first_tensor(run_module()), _first_tensor(output)
    if expected is None or got is None:
        if (expected is None) != (got is None):
            raise ValueError(f"{adapter}: must return {_kind(expected)} as the module itself does, got {_kind(got)}")
        return
    if expected.shape != got.shape:
        raise ValueError(
            f"{adapter}: must return shape {tuple(expected.shape)} as the module itself does, got {tuple(got.shape)}"
        )
    places = _real_positions([padding for _, padding in calls], tuple(expected.shape))
    if not places:
        return  # this shape doesn't show where the padding is
    zero = _first_tensor(run_without_attention())
    added = got if zero is None else got - zero
    sizes = [_norm(added, real) for real in places]
    tolerance = max(_tolerance(dtype) for dtype in (got.dtype, *(dtype for dtype, _ in calls)))
    rounding = 8 * torch.finfo(got.dtype).eps
    allowed = [tolerance * size + rounding * _norm(expected, real) for size, real in zip(sizes, places, strict=True)]

    def equals_expected(x: Tensor) -> bool:
        return any(_norm(x - expected, real) <= most for real, most in zip(places, allowed, strict=True))

    if equals_expected(got):
        return
    again = _first_tensor(run_module())
    if again is None or not equals_expected(again):  # the module never returns the same twice
        return
    error = min(_norm(got - expected, real) / max(size, 1e-30) for real, size in zip(places, sizes, strict=True))
    raise ValueError(
        f"{adapter}: must return the module's own output when it attends to every key, got an output that differs by "
        f"{error:.2g} of what attention adds to it; look at its projections and at the causal, key_padding_mask and "
        "scale that it passes to attend. If the module does something else on purpose, call register_adapter(..., "
        "check=False)"
    )


def _real_positions(paddings: list[Tensor | None], shape: tuple[int, ...]) -> list[Tensor | None]:
    """The masks (True = token) that fit the first axes of an output of this shape.

    Several may fit, because the length may come before the batch. [None] without padding, [] if no mask fits.
    """
    given = [padding for padding in paddings if padding is not None]
    if not any(bool(padding.any()) for padding in given):
        return [None]
    if len(given) < len(paddings) or len({padding.shape[1] for padding in given}) > 1:
        return []
    real = ~torch.cat(given)
    found = (real, real.T, real.flatten(), real.T.flatten())
    return [mask for mask in found if tuple(mask.shape) == shape[: mask.dim()]]


def _norm(x: Tensor, real: Tensor | None) -> float:
    return float(torch.linalg.vector_norm((x if real is None else x[real]).double()))


def _tolerance(dtype: torch.dtype) -> float:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the precision was set per backend, in torch's newer way
        precision = "high"
    if dtype not in (torch.float32, torch.float64) or precision == "medium":
        return 0.05
    return 1e-3 if precision == "highest" else 0.01


def _first_tensor(output: object) -> Tensor | None:
    # A module may return more than its output, but returns its output first.
    return next(iter(tensors_in(output)), None)


def _kind(x: object) -> str:
    return "a tensor" if isinstance(x, Tensor) else "no tensor"
