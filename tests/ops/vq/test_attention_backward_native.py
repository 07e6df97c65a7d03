"""The compiled backward of attention, half precision, and independence of how the work is split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.native import threads
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import attention_cases

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def gradients(out, leaves, seed=1):
    torch.manual_seed(seed)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def attend(leaves, codebook, options, codes, backend):
    """The output, and the gradients of a random objective; the bias, if present, is a leaf."""
    options = {**options, "bias": leaves.get("bias")}
    out = ops.vq_attention(*(leaves[n] for n in "qkv"), codebook, **options, codes=codes, backend=backend)
    return {"out": out.detach(), **gradients(out, leaves)}


@given(attention_cases(max_length=180), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=60)
def test_half_types_with_gradients(case, dtype):
    """At most twice the error of the dense definition in that type, which computes in float32 and rounds once."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in case.tensors(torch.float64).items()}
    codes = ops.vq_assign(leaves["k"].detach(), case.codebook.float(), backend="reference")
    codebook = case.codebook.float()
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = attend(wide, codebook.double(), case.options, codes, "reference")
    plain = attend(leaves, codebook, case.options, codes, "reference")
    for name, value in attend(leaves, codebook, case.options, codes, "native").items():
        assert value.dtype == dtype and value.isfinite().all(), name
        if value.numel():
            error, other = ((x.double() - exact[name]).abs().max() for x in (value, plain[name]))
            # Gradients of scores use the rounded output, so rounding errors remain where these gradients cancel.
            size = exact[name].abs().max() + (leaves["q"].abs().max().double() if name == "k" else 1)
            assert error <= 2 * other + EPSILON[dtype] * size, (name, float(error), float(other))


def drawn(causal, window, length=400, heads=4, kv_heads=2, head_dim=16, exact=True):
    q = torch.randn(1, heads, length, head_dim)
    k, v = torch.randn(1, kv_heads, length, head_dim), torch.randn(1, kv_heads, length, head_dim)
    leaves = {"q": q, "k": k, "v": v}
    if window:
        leaves["bias"] = torch.randn(heads, window if causal else 2 * window - 1)
    options = {"causal": causal, "window": window, "local_keys": "exact" if exact else "quantized"}
    return {name: x.requires_grad_() for name, x in leaves.items()}, torch.randn(kv_heads, 24, head_dim), options


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [1, 50, 72])
def test_where_blocks_begin_changes_nothing(causal, window, shift):
    """Masked positions before the sequence, which shift every block, and after it."""
    leaves, codebook, options = drawn(causal, window)
    codes = ops.vq_assign(leaves["k"].detach(), codebook)
    alone = attend(leaves, codebook, options, codes, "native")

    def padded(x, value=0.0):
        return torch.nn.functional.pad(x, (0,) * (2 * (x.dim() - 3)) + (shift, 7), value=value)

    mask = torch.ones(1, 400 + shift + 7, dtype=torch.bool)
    mask[:, shift:-7] = False
    moved = {n: padded(x.detach()) if n in "qkv" else x.detach().clone() for n, x in leaves.items()}
    moved = {n: x.requires_grad_() for n, x in moved.items()}
    out = ops.vq_attention(
        *(moved[n] for n in "qkv"),
        codebook,
        **options,
        bias=moved.get("bias"),
        key_padding_mask=mask,
        codes=padded(codes.unsqueeze(-1), 3).squeeze(-1),
        backend="native",
    )
    torch.manual_seed(1)
    grad = padded(torch.randn(1, 4, 400, 16, dtype=torch.float64).float(), 5.0)
    found = dict(zip(moved, torch.autograd.grad(out, list(moved.values()), grad), strict=True))
    for name, x in {"out": out, **found}.items():
        if name != "bias":
            outside = torch.cat([x[:, :, :shift], x[:, :, -7:]], 2)
            assert torch.equal(outside, torch.zeros_like(outside)), name
            x = x[:, :, shift:-7]
        assert (x - alone[name]).abs().max() <= 2e-5 * (1 + alone[name].abs().max()), name


@pytest.mark.parametrize(("causal", "window"), [(c, w) for c in (False, True) for w in (0, 1, 30, 120)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("length", [800, 2000])
def test_heads_in_several_parts(causal, window, heads, length):
    """Long sequences with few heads, whose blocks go to different threads; some keys and one whole block are masked."""
    leaves, codebook, options = drawn(causal, window, length, heads=heads, kv_heads=1, head_dim=8)
    options["key_padding_mask"] = torch.rand(1, length) < 0.1
    options["key_padding_mask"][:, 288:360] = True
    codes = ops.vq_assign(leaves["k"].detach(), codebook)
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = attend(wide, codebook.double(), options, codes, "torch")
    plain = attend(leaves, codebook, options, codes, "torch")
    for name, value in attend(leaves, codebook, options, codes, "native").items():
        error, other = ((x.double() - exact[name]).abs().max() for x in (value, plain[name]))
        assert error <= 2 * other + 2e-6 * (1 + exact[name].abs().max()), (name, float(error), float(other))


@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (False, 30), (True, 30)])
@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_are_the_same_bits_for_any_number_of_threads(causal, window, heads):
    leaves, codebook, options = drawn(causal, window, length=1500, heads=heads, kv_heads=heads)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(attend(leaves, codebook, options, None, "native"))
    for other in results[1:]:
        assert all(torch.equal(x, results[0][name]) for name, x in other.items())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("special", ["huge scores", "tiny scores", "one code", "equal keys", "no key", "few keys"])
def test_gradients_at_extremes(causal, window, special):
    leaves, codebook, options = drawn(causal, window, length=300, exact=False)
    mask = torch.zeros(1, 300, dtype=torch.bool)
    with torch.no_grad():
        if special == "huge scores":
            leaves["q"] *= 1e4
        elif special == "tiny scores":
            leaves["q"] *= 1e-30
        elif special == "one code":
            codebook[:, 1:] += 1e3
        elif special == "equal keys":
            leaves["k"][:] = 0.25
        elif special == "no key":
            mask[:] = True
        else:
            mask[:, 5:290] = True
    codes = ops.vq_assign(leaves["k"].detach(), codebook)
    options["key_padding_mask"] = mask
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = attend(wide, codebook.double(), options, codes, "reference")
    plain = [attend(leaves, codebook, options, codes, backend) for backend in ("reference", "torch")]
    for name, value in attend(leaves, codebook, options, codes, "native").items():
        assert value.isfinite().all(), name
        error, *others = ((x[name].double() - exact[name]).abs().max() for x in ({name: value}, *plain))
        assert error <= 2 * max(others) + 1e-5 * (1 + exact[name].abs().max()), (name, float(error), others)


def test_causal_jacobians_are_triangular_and_reach_the_past():
    length = 160  # three blocks
    leaves, codebook, _ = drawn(True, 5, length, heads=1, kv_heads=1, head_dim=4)
    codes = ops.vq_assign(leaves["k"].detach(), codebook)
    q, k, v = (leaves[n] for n in "qkv")
    out = ops.vq_attention(q, k, v, codebook, causal=True, window=5, codes=codes, backend="native")
    rows = [torch.autograd.grad(out[0, 0, i].sum(), [q, v], retain_graph=True) for i in range(length)]
    dq, dv = (torch.stack([row[n][0, 0].abs().sum(-1) for row in rows]) for n in range(2))
    assert torch.equal(dq, dq.diagonal().diag())
    assert torch.equal(dv, dv.tril()) and (dv.tril() != 0).sum() == length * (length + 1) // 2


def test_gradient_of_a_sum_comes_expanded():
    leaves, codebook, options = drawn(True, 9, length=100)
    codes = ops.vq_assign(leaves["k"].detach(), codebook)
    for backend in ("native", "torch"):
        out = ops.vq_attention(
            *(leaves[n] for n in "qkv"), codebook, **options, bias=leaves["bias"], codes=codes, backend=backend
        )
        found = torch.autograd.grad(out.sum(), list(leaves.values()))
        if backend == "native":
            native = found
    for name, a, b in zip(leaves, native, found, strict=True):
        assert (a - b).abs().max() <= 2e-5 * (1 + b.abs().max()), name


def test_fake_results_are_like_real_ones_and_wrong_calls_raise():
    leaves, codebook, _ = drawn(True, 9, length=100)
    q, k, v, bias = (x.detach() for x in leaves.values())
    codes = ops.vq_assign(k, codebook)
    arguments = attention_arguments(q, k, v, codebook, codes, bias=bias, scale=0.25, causal=True, window=9)
    out, normalizers = torch.ops.longvq.vq_attention(*arguments)
    backward = torch.ops.longvq.vq_attention_backward.default
    right = [torch.randn_like(out), out, normalizers, *arguments]
    torch.library.opcheck(backward, tuple(right), test_utils=("test_schema", "test_faketensor"))
    for place, wrong, message in (
        (0, out.double(), "grad must be"),
        (1, out[:, :, 1:], "out must be"),
        (2, normalizers[:, :1], "normalizers must be"),
        (7, codes + 24, r"codes must lie in \[0, S\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*right[:place], wrong, *right[place + 1 :])
