"""What an adapter passes to `attend`, and whether it does what its module does."""

import torch
from torch import Tensor

from longvq_layers.layers._inputs import flags, number
from longvq_layers.ops import _checks as check

_TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01}  # relative; 32 bits may be TF32 on a GPU
_TOLERANCE_OF_HALF = 0.05


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
    flags(adapter, causal=causal)
    if key_padding_mask is not None:
        check.key_padding_mask(adapter, key_padding_mask, batch, length)
        check.same_device(adapter, "q", q, key_padding_mask=key_padding_mask)
    if scale is not None:
        number(adapter, "scale", scale)


def check_output(adapter: str, expected: object, got: object, padding: Tensor | None) -> None:
    """With attention to every key the adapter returns what its module does, but for padded positions (B, L).

    Raises:
        ValueError: it doesn't.
    """
    expected, got = _first_tensor(expected), _first_tensor(got)
    if expected is None or got is None:
        if (expected is None) != (got is None):
            raise ValueError(f"{adapter}: returns {_kind(got)}, expected {_kind(expected)} as the module itself does")
        return
    if expected.shape != got.shape:
        raise ValueError(
            f"{adapter}: returns shape {tuple(got.shape)}, expected {tuple(expected.shape)} as the module itself does"
        )
    if padding is not None and bool(padding.any()):
        real = next((x for x in (~padding, ~padding.T) if x.shape == expected.shape[:2]), None)
        if real is None:
            return  # nobody knows where in this shape the padding is
        expected, got = expected[real], got[real]
    tolerance = _TOLERANCE.get(got.dtype, _TOLERANCE_OF_HALF)
    size = torch.linalg.vector_norm(expected.double())
    error = torch.linalg.vector_norm(got.double() - expected.double())
    if not bool(error <= tolerance * size):  # NaN too
        raise ValueError(
            f"{adapter}: with attention to every key its output differs from the module's own by "
            f"{float(error / size):.2g} of its size, expected at most {tolerance:g}; look at its projections and at "
            "the causal, key_padding_mask and scale that it passes to attend. If the module does something else on "
            "purpose, call register_adapter(..., check=False)"
        )


def _first_tensor(output: object) -> Tensor | None:
    # The output of the attention comes first, whatever else comes with it.
    if isinstance(output, dict):  # transformers' ModelOutput too
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _kind(x: object) -> str:
    return "a tensor" if isinstance(x, Tensor) else "no tensor"
