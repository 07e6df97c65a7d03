"""vq_attention: every backend against the dense definition, and the properties that the definition implies."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from longvq_layers import ops
from tests.largest import LargestTensor
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import attention_cases
from tests.tolerances import assert_close


def run(case, backend, dtype=torch.float64, codes=None):
    """The output, and the gradients of a fixed random objective."""
    leaves = case.tensors(dtype)
    options = dict(case.options)
    if "bias" in leaves:
        options["bias"] = leaves["bias"]
    out = ops.vq_attention(
        leaves["q"], leaves["k"], leaves["v"], case.codebook, **options, codes=codes, backend=backend
    )
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))}


@given(attention_cases())
@settings(max_examples=150)
def test_torch_equals_reference_with_gradients(case):
    expected, actual = run(case, "reference"), run(case, "torch")
    for name, value in actual.items():
        assert_close(value, expected[name], name)


@given(attention_cases(max_length=90))
@settings(max_examples=30)
def test_auto_equals_reference_in_float32(case):
    # Codes are given: near a tie the two precisions may choose different codes, and both are right.
    codes = ops.vq_assign(case.k, case.codebook, backend="reference")
    case.codebook = case.codebook.float()
    expected, actual = run(case, "reference", codes=codes), run(case, "auto", torch.float32, codes=codes)
    for name, value in actual.items():
        # Scores of size 30 lose two digits in float32 before the exponential.
        scale = 30 if float(case.q.abs().amax() if case.q.numel() else 0) > 10 else 1
        assert torch.isfinite(value).all(), name
        if value.numel():
            error = (value.double() - expected[name]).abs().max() / (1 + expected[name].abs().max())
            assert error < 2e-5 * scale, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_error_is_at_most_twice_the_plain_computation(dtype, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 32).to(dtype) for _ in range(3))
    codebook = torch.randn(4, 40, 32)
    codes = ops.vq_assign(k, codebook)
    options = dict(causal=causal, window=16, codes=codes)
    exact = ops.vq_attention(*(x.double() for x in (q, k, v)), codebook.double(), backend="reference", **options)
    # The same dense attention in this dtype by PyTorch's own kernel.
    i = torch.arange(300)[:, None] - torch.arange(300)[None, :]
    near = ((i >= 0) if causal else (i.abs() >= 0)) if causal else torch.ones_like(i, dtype=torch.bool)
    k_hat = torch.stack([codebook.to(dtype)[h][codes[:, h]] for h in range(4)], 1)
    plain = scaled_dot_product_attention(q, k_hat, v, attn_mask=near)
    error = (ops.vq_attention(q, k, v, codebook, **options).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_equals_ordinary_attention_when_every_key_is_a_codeword(causal, backend):
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64) for _ in range(3))
    out = ops.vq_attention(q, k, v, k[0], causal=causal, window=4, backend=backend)
    assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=causal), "out")


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_causal_jacobians_are_triangular_and_reach_the_past(window, activation):
    length = 70
    q, k, v = (torch.randn(1, 1, length, 4, dtype=torch.float64) for _ in range(3))
    codebook = torch.randn(1, 5, 4, dtype=torch.float64)
    codes = ops.vq_assign(k, codebook)

    def outputs(q, v):
        return ops.vq_attention(q, k, v, codebook, causal=True, window=window, activation=activation, codes=codes)

    dq, dv = (j[0, 0, :, :, 0, 0].abs().sum((1, 3)) for j in torch.autograd.functional.jacobian(outputs, (q, v)))
    assert torch.equal(dq, dq.diagonal().diag())  # an output depends on its own query only
    assert torch.equal(dv, dv.tril())
    assert (dv[dv.tril() != 0].numel()) == length * (length + 1) // 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_future_tokens_change_no_output(backend):
    q, k, v = (torch.randn(1, 2, 300, 8) for _ in range(3))
    codebook = torch.randn(2, 16, 8)
    before = ops.vq_attention(q, k, v, codebook, causal=True, window=9, backend=backend)
    for x in (q, k, v):
        x[:, :, 200:] += 10
    after = ops.vq_attention(q, k, v, codebook, causal=True, window=9, backend=backend)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys_count_nowhere_on_either_side(causal):
    q, k, v = (torch.randn(1, 2, 90, 8, dtype=torch.float64) for _ in range(3))
    codebook = torch.randn(2, 16, 8, dtype=torch.float64)
    options = dict(causal=causal, window=7)
    alone = ops.vq_attention(q, k, v, codebook, **options)
    for left, right in ((0, 40), (40, 0), (13, 150)):
        padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=3.0) for x in (q, k, v)]
        mask = torch.ones(1, left + 90 + right, dtype=torch.bool)
        mask[:, left : left + 90] = False
        out = ops.vq_attention(*padded, codebook, key_padding_mask=mask, **options)
        assert_close(out[:, :, left : left + 90], alone, f"padding {left}, {right}")
        assert (out[:, :, :left] == 0).all() and (out[:, :, left + 90 :] == 0).all()


def test_a_permutation_of_the_codebook_changes_nothing():
    q, k, v = (torch.randn(2, 2, 150, 8, dtype=torch.float64) for _ in range(3))
    codebook = torch.randn(2, 20, 8, dtype=torch.float64)
    out = ops.vq_attention(q, k, v, codebook, causal=True, window=6)
    assert_close(ops.vq_attention(q, k, v, codebook[:, torch.randperm(20)], causal=True, window=6), out, "out")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits_stay_finite(causal, window, activation, logit):
    q, k, v = (torch.randn(1, 1, 100, 4) for _ in range(3))
    k[..., 0] = 1
    q[..., 0] = logit
    codebook = torch.randn(1, 8, 4)
    codebook[..., 0] = 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scale = 1.0 if activation == "softmax" else None
    out = ops.vq_attention(q, k, v, codebook, causal=causal, window=window, activation=activation, scale=scale)
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
def test_opcheck(activation, causal, namespace):
    dtype = torch.float32 if namespace == "longvq" else torch.float64  # what the compiled kernel takes
    q, k, v = (torch.randn(1, 4, 70, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    codebook = torch.randn(4, 6, 4, dtype=dtype)
    codes = ops.vq_assign(k, codebook)
    bias = torch.randn(4, 3 if causal else 5, dtype=dtype, requires_grad=True)
    mask = torch.rand(1, 70) < 0.2
    op = getattr(torch.ops, namespace).vq_attention.default
    torch.library.opcheck(
        op,
        attention_arguments(
            q, k, v, codebook, codes, bias=bias, key_padding_mask=mask, causal=causal, window=3, activation=activation
        ),
    )
    options = {"causal": causal, "window": 0, "activation": activation, "key_grad": "window"}
    torch.library.opcheck(op, attention_arguments(q, k, v, codebook, codes, **options))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_gradcheck_with_codes_held_fixed(causal, activation):
    q, v = (torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    k = torch.randn(1, 1, 9, 3, dtype=torch.float64)
    v = v[:, :1].detach().requires_grad_()
    codebook = torch.randn(1, 4, 3, dtype=torch.float64)
    codes = ops.vq_assign(k, codebook)
    bias = torch.randn(2, 2 if causal else 3, dtype=torch.float64, requires_grad=True)

    def call(q, v, bias):
        return ops.vq_attention(
            q, k, v, codebook, causal=causal, window=2, bias=bias, activation=activation, codes=codes
        )

    assert torch.autograd.gradcheck(call, (q, v, bias))


def test_compiles_without_graph_breaks_and_gives_the_same_values():
    q, k, v = (torch.randn(1, 4, 130, 8, requires_grad=True) for _ in range(3))
    codebook = torch.randn(4, 16, 8)

    def call(q, k, v):
        return ops.vq_attention(q, k, v, codebook, causal=True, window=4)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, expected = compiled(q, k, v), call(q, k, v)
    assert_close(out, expected, "out")
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)), strict=True):
        assert_close(a, b, "gradient")


def test_memory_is_linear_in_the_length():
    """In forward and backward, no tensor has more elements than a fixed multiple of L."""

    def largest(length, causal):
        q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
        codebook, codes = torch.randn(1, 64, 8), torch.randint(64, (1, 1, length))
        bias = torch.zeros(1, 16 if causal else 31)
        arguments = attention_arguments(q, k, v, codebook, codes, bias=bias, scale=0.3, causal=causal, window=16)
        with LargestTensor() as mode:
            out, normalizers = torch.ops.longvq_torch.vq_attention(*arguments)
            torch.ops.longvq_torch.vq_attention_backward(torch.ones_like(out), out, normalizers, *arguments)
        return mode.bytes

    for causal in (False, True):
        assert largest(8192, causal) <= 4.5 * largest(2048, causal)
        assert largest(8192, causal) < 8192 * 8192 / 20  # bytes; a dense bool mask would be 67 MB


BAD = {
    "rank of q": (dict(q=torch.zeros(4, 5, 8)), ValueError, "q must have 4 dimensions"),
    "no tensor": (dict(k=[1.0]), TypeError, "k must be a torch.Tensor"),
    "integer q": (dict(q=torch.zeros(1, 2, 5, 8, dtype=torch.int64)), TypeError, "q must be a real floating-point"),
    "dtype of v": (dict(v=torch.zeros(1, 2, 5, 8).half()), TypeError, "v must have the dtype of q"),
    "heads": (dict(q=torch.zeros(1, 3, 5, 8)), ValueError, "must be a multiple"),
    "head_dim of k": (dict(k=torch.zeros(1, 2, 5, 7)), ValueError, "k must have shape"),
    "length of v": (dict(v=torch.zeros(1, 2, 6, 8)), ValueError, "v must have shape"),
    "codebook shape": (dict(codebook=torch.zeros(2, 4, 7)), ValueError, "codebook must have shape"),
    "no codes": (dict(codebook=torch.zeros(2, 0, 8)), ValueError, "at least one code"),
    "NaN codebook": (dict(codebook=torch.full((2, 4, 8), float("nan"))), ValueError, "codebook must be finite"),
    "negative window": (dict(window=-1), ValueError, "window must be 0"),
    "window type": (dict(window=2.0), TypeError, "window must be an int"),
    "bias without window": (dict(bias=torch.zeros(2, 3)), ValueError, "window=0"),
    "bias shape": (dict(bias=torch.zeros(2, 3), window=3), ValueError, "bias must have shape"),
    "mask shape": (dict(key_padding_mask=torch.zeros(1, 4, dtype=torch.bool)), ValueError, "key_padding_mask"),
    "mask dtype": (dict(key_padding_mask=torch.zeros(1, 5)), TypeError, "key_padding_mask must be bool"),
    "activation": (dict(activation="relu"), ValueError, "'softmax', 'laplace'"),
    "local keys": (dict(local_keys="both"), ValueError, "local_keys must be one of"),
    "key grad": (dict(key_grad="none"), ValueError, "key_grad must be one of"),
    "scale with laplace": (dict(activation="laplace", scale=1.0), ValueError, "scale has no effect"),
    "causal": (dict(causal="no"), TypeError, "causal must be a bool"),
    "scale type": (dict(scale=True), ValueError, "scale must be a finite number"),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be a finite number"),
    "codes dtype": (dict(codes=torch.zeros(1, 2, 5)), TypeError, "codes must be int64"),
    "codes range": (dict(codes=torch.full((1, 2, 5), 4)), ValueError, "codes must lie in"),
    "device": (dict(v=torch.zeros(1, 2, 5, 8, device="meta")), ValueError, "v must be on the device of q"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    arguments = {x: torch.zeros(1, 2, 5, 8) for x in "qkv"} | {"codebook": torch.zeros(2, 4, 8)} | changes
    with pytest.raises(error, match=message):
        ops.vq_attention(**arguments)


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_changes_neither_values_nor_gradients(causal):
    q, k, v = (torch.randn(1, 2, 100, 8, requires_grad=True) for _ in range(3))
    codebook = torch.randn(2, 16, 8)

    def call():
        out = ops.vq_attention(q, k, v, codebook, causal=causal, window=5)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    plain = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call()
    for name, a, b in zip(("out", "q", "k", "v"), inside, plain, strict=True):
        assert torch.equal(a, b), name
