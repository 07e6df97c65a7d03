"""vq_attention(far_q=, far_k=): separate queries and keys for pairs outside the window, as rotary positions need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import AttentionCase, attention_cases
from tests.tolerances import assert_close

LEAVES = ("q", "k", "v", "far_q", "far_k")


@st.composite
def far_cases(draw, **options) -> tuple[AttentionCase, torch.Tensor, torch.Tensor]:
    """A case with exact keys, far_q and far_k, and a codebook of their width."""
    case = draw(attention_cases(**options))
    head_dim = draw(st.sampled_from([1, 3, 8]))
    case.options["local_keys"] = "exact"
    case.codebook = torch.randn(*case.codebook.shape[:2], head_dim, dtype=torch.float64)
    far_q = torch.randn(*case.q.shape[:3], head_dim, dtype=torch.float64)
    far_k = torch.randn(*case.k.shape[:3], head_dim, dtype=torch.float64)
    return case, far_q.transpose(1, 2).contiguous().transpose(1, 2), far_k


def attend(drawn, backend, dtype=torch.float64, codes=None):
    """The output, and the gradients of a fixed random objective."""
    case, far_q, far_k = drawn
    leaves = {
        **case.tensors(dtype),
        "far_q": far_q.to(dtype).requires_grad_(),
        "far_k": far_k.to(dtype).requires_grad_(),
    }
    options = {**case.options, **{name: x for name, x in leaves.items() if name not in ("q", "k", "v")}}
    precise = torch.promote_types(dtype, torch.float32)
    out = ops.vq_attention(
        leaves["q"], leaves["k"], leaves["v"], case.codebook.to(precise), **options, codes=codes, backend=backend
    )
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))}


def definition(q, k, v, far_q, far_k, codebook, *, causal, window, mask, scale):
    """Softmax attention with scores of far_q and codewords outside the window; without gradients of keys."""
    codes = ops.vq_assign(far_k, codebook)
    heads = q.shape[1] // k.shape[1]
    coded = torch.stack([codebook[h][codes[:, h]] for h in range(k.shape[1])], dim=1)
    k, v, coded = (x.repeat_interleave(heads, dim=1) for x in (k, v, coded))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    near = distance.abs() < window
    scores = scale * torch.where(near, q @ k.mT, far_q @ coded.mT)
    allowed = (~mask)[:, None, None, :] & ((distance >= 0) | torch.tensor(not causal))
    weights = torch.nan_to_num(scores.masked_fill(~allowed, -torch.inf).softmax(-1))
    return (weights @ v).masked_fill(mask[:, None, :, None], 0)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 20, 500])
def test_equals_the_definition(backend, causal, window):
    torch.manual_seed(0)
    q, far_q, k, far_k = (torch.randn(2, heads, 150, head_dim) for heads in (4, 2) for head_dim in (8, 5))
    v, codebook, mask = torch.randn(2, 2, 150, 6), torch.randn(2, 12, 5), torch.rand(2, 150) < 0.2
    options = {"causal": causal, "window": window, "scale": 0.4}
    expected = definition(q, k, v, far_q, far_k, codebook, mask=mask, **options)
    options |= {"key_padding_mask": mask, "local_keys": "exact", "backend": backend}
    out = ops.vq_attention(q, k, v, codebook, far_q=far_q, far_k=far_k, **options)
    assert (out - expected).abs().max() < 1e-5


@given(far_cases())
@settings(max_examples=60)
def test_torch_equals_reference_with_gradients(drawn):
    expected, actual = attend(drawn, "reference"), attend(drawn, "torch")
    for name, value in actual.items():
        assert_close(value, expected[name], name)


@given(far_cases(max_length=230))
@settings(max_examples=100)
def test_native_equals_reference_with_gradients(drawn):
    case, far_q, far_k = drawn
    rounded = AttentionCase(*(x.float().double() for x in (case.q, case.k, case.v, case.codebook)), case.options)
    drawn = rounded, far_q.float().double(), far_k.float().double()
    codes = ops.vq_assign(drawn[2], rounded.codebook, backend="reference")
    expected, actual = attend(drawn, "reference", codes=codes), attend(drawn, "native", torch.float32, codes)
    plain = [attend(drawn, backend, torch.float32, codes) for backend in ("reference", "torch")]
    for name, value in actual.items():
        if value.numel():
            error, *others = ((x.double() - expected[name]).abs().max() for x in (value, *(p[name] for p in plain)))
            # Where gradients of scores cancel, their rounding errors remain, and are multiplied by queries in dk.
            size = 1 + expected[name].abs().max() + (case.q.abs().max() if name in ("k", "far_k") else 0)
            assert error <= 2 * max(others) + 2e-6 * size, (name, float(error), others)


@given(far_cases(max_length=200, packed=True))
@settings(max_examples=30)
def test_packed_documents(drawn):
    codes = ops.vq_assign(drawn[2], drawn[0].codebook, backend="reference")
    expected = attend(drawn, "reference", codes=codes)
    for backend, dtype, tolerance in (("torch", torch.float64, 1e-9), ("native", torch.float32, 1e-3)):
        for name, value in attend(drawn, backend, dtype, codes).items():
            if value.numel():
                error = (value.double() - expected[name]).abs().max()
                assert error <= tolerance * (1 + expected[name].abs().max()), (backend, name)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_differences(causal):
    """Gradients of q, far_q and v are exact; those of k are exact where every pair is inside the window."""
    torch.manual_seed(0)
    q, far_q, v = (torch.randn(1, 2, 9, d, dtype=torch.float64, requires_grad=True) for d in (3, 2, 4))
    k, far_k = (torch.randn(1, 2, 9, d, dtype=torch.float64, requires_grad=True) for d in (3, 2))
    codebook = torch.randn(2, 4, 2, dtype=torch.float64)
    codes = ops.vq_assign(far_k, codebook)

    def call(window):
        def attention(q, k, v, far_q):
            return ops.vq_attention(
                q, k, v, codebook, far_q=far_q, far_k=far_k.detach(), causal=causal, window=window,
                local_keys="exact", codes=codes, backend="torch",
            )  # fmt: skip

        return attention

    assert torch.autograd.gradcheck(lambda q, v, far_q: call(3)(q, k.detach(), v, far_q), (q, v, far_q))
    assert torch.autograd.gradcheck(call(20), (q, k, v, far_q))


def test_each_key_gets_the_gradients_of_its_own_pairs():
    """Pairs inside the window give gradients to q and k only, other pairs to far_q and far_k only."""
    torch.manual_seed(0)
    for window, learns in ((0, "far_k"), (40, "k")):
        q, k, v, far_q, far_k = (torch.randn(1, 1, 40, 4, requires_grad=True) for _ in LEAVES)
        out = ops.vq_attention(
            q, k, v, torch.randn(1, 4, 4), far_q=far_q, far_k=far_k, causal=True, window=window, local_keys="exact"
        )
        out.square().sum().backward()
        assert (far_k.grad.abs().max() > 1e-4) == (learns == "far_k") and (k.grad.abs().max() > 1e-4) == (learns == "k")
        assert (far_q.grad.abs().max() > 1e-4) == (learns == "far_k") and (q.grad.abs().max() > 1e-4) == (learns == "k")


@pytest.mark.parametrize("namespace", ["longvq_torch", "longvq"])
def test_opcheck(namespace):
    q, k, v, far_q, far_k = (torch.randn(1, 2, 20, d, requires_grad=True) for d in (4, 4, 4, 3, 3))
    codebook = torch.randn(2, 6, 3)
    codes = ops.vq_assign(far_k.detach(), codebook)
    arguments = attention_arguments(q, k, v, codebook, codes, far_q=far_q, far_k=far_k, causal=True, window=5)
    torch.library.opcheck(getattr(torch.ops, namespace).vq_attention.default, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"far_k": None}, ValueError, "far_k must be given with far_q, got None"),
        ({"far_q": None}, ValueError, "far_q must be given with far_k, got None"),
        ({"far_q": torch.randn(1, 4, 9)}, ValueError, "far_q must have 4 dimensions"),
        ({"far_q": torch.randn(1, 4, 8, 3)}, ValueError, "far_q"),
        ({"far_k": torch.randn(1, 2, 9, 4)}, ValueError, "far_k"),
        ({"far_k": torch.randn(1, 2, 9, 3).double()}, TypeError, "far_k must have the dtype of q"),
        ({"far_q": "x"}, TypeError, "far_q"),
        ({"codebook": torch.randn(2, 4, 5)}, ValueError, "D = 3 of far_k"),
        ({"local_keys": "quantized"}, ValueError, 'local_keys must be "exact" with far_q'),
    ],
)
def test_wrong_arguments(changes, error, message):
    q, k, v = torch.randn(1, 4, 9, 5), torch.randn(1, 2, 9, 5), torch.randn(1, 2, 9, 6)
    arguments = {
        "codebook": torch.randn(2, 4, 3),
        "far_q": torch.randn(1, 4, 9, 3),
        "far_k": torch.randn(1, 2, 9, 3),
        "local_keys": "exact",
    }
    assert ops.vq_attention(q, k, v, **arguments).shape == (1, 4, 9, 6)
    with pytest.raises(error, match=message):
        ops.vq_attention(q, k, v, **{**arguments, **changes})


def test_wrong_direct_calls_raise():
    q, k, v, codebook = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 3), torch.randn(1, 6, 4)
    codes = torch.zeros(1, 1, 5, dtype=torch.int64)
    for wrong in ({"far_k": None}, {"far_q": None}, {"far_q": q[..., :3]}, {"local_keys": "quantized"}):
        arguments = attention_arguments(q, k, v, codebook, codes, **{"far_q": q, "far_k": k, **wrong})
        with pytest.raises(RuntimeError, match=r"far_[qk]"):
            torch.ops.longvq.vq_attention(*arguments)
