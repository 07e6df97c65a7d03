"""vq_assign: backends against brute force, ties, extreme values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.strategies import LAYOUTS, layout

BACKENDS = ["reference", "torch", "auto"]


def assert_nearest(codes, k, codebook):
    """The distance to each chosen codeword is the smallest one, up to rounding."""
    distance = (k.double().unsqueeze(3) - codebook.double()[:, None]).square().sum(-1)
    chosen = distance.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    size = k.double().square().sum(-1) + codebook.double().square().sum(-1).amax()
    assert ((chosen - distance.amin(-1)) <= 1e-5 * size + 1e-30).all()


@given(st.data())
@settings(max_examples=60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_a_nearest_codeword(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    batch, heads, length = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 70))
    codes, head_dim = data.draw(st.sampled_from([1, 2, 31, 100])), data.draw(st.sampled_from([1, 3, 16, 33]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    k = layout(torch.randn(batch, heads, length, head_dim).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
    codebook = torch.randn(heads, codes, head_dim)
    result = ops.vq_assign(k, codebook, backend=backend)
    assert result.dtype == torch.int64 and result.shape == k.shape[:3]
    assert_nearest(result, k, codebook)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_code(backend):
    codebook = torch.randn(2, 8, 5).repeat(1, 3, 1)  # every codeword three times
    k = torch.randn(2, 2, 40, 5)
    assert (ops.vq_assign(k, codebook, backend=backend) < 8).all()
    for copies in (2, 3, 5, 7, 9, 17, 33, 100):  # a matrix product may round equal columns differently
        for dtype in (torch.float32, torch.float64) if backend != "native" else (torch.float32,):
            codebook = torch.randn(2, 1, 5, dtype=dtype).expand(2, copies, 5)
            assert (ops.vq_assign(k.to(dtype), codebook, backend=backend) == 0).all(), copies
    between = torch.tensor([[[[0.0]]]])  # as far from -1 as from +1
    assert ops.vq_assign(between, torch.tensor([[[5.0], [1.0], [-1.0]]]), backend=backend).item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_keys_and_codebook(backend):
    k = torch.randn(1, 1, 9, 4).expand(3, 2, 9, 4)
    codebook = torch.randn(1, 6, 4).expand(2, 6, 4)
    codes = ops.vq_assign(k, codebook, backend=backend)
    assert torch.equal(codes, codes[:1, :1].expand(3, 2, 9))
    assert_nearest(codes, k, codebook)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_keys_give_a_valid_code(value, backend):
    codes = ops.vq_assign(torch.full((1, 1, 3, 4), value), torch.randn(1, 6, 4), backend=backend)
    assert ((codes >= 0) & (codes < 6)).all()


def test_huge_finite_codewords_are_no_error():
    codebook = torch.full((1, 6, 4), 3e38)  # their sum overflows
    assert (ops.vq_assign(torch.zeros(1, 1, 3, 4), codebook) < 6).all()


def test_no_gradient_and_not_affected_by_autocast():
    k, codebook = torch.randn(1, 2, 200, 16, requires_grad=True), torch.randn(2, 64, 16)
    plain = ops.vq_assign(k, codebook, backend="torch")
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.vq_assign(k, codebook, backend="torch"), plain)


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opcheck(namespace, dtype):
    if namespace == "longvq" and dtype == torch.float64:
        return  # Python never calls the kernel with float64
    op = getattr(torch.ops, namespace).vq_assign.default
    for length in (7, 20):  # the kernels for few and for many keys
        k, codebook = torch.randn(2, 3, length, 5, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)
        torch.library.opcheck(op, (k, codebook))


def test_compiles_without_graph_breaks():
    k, codebook = torch.randn(1, 2, 50, 8), torch.randn(2, 16, 8)
    compiled = torch.compile(ops.vq_assign, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k, codebook), ops.vq_assign(k, codebook))


@pytest.mark.parametrize(
    ("k", "codebook", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(3, 5, 4), ValueError, "k must have 4 dimensions"),
        (torch.zeros(1, 2, 3, 4).long(), torch.zeros(2, 5, 4), TypeError, "k must be a real floating-point"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 4), ValueError, "codebook must have shape"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(2, 0, 4), ValueError, "at least one code"),
        (torch.zeros(1, 2, 3, 0), torch.zeros(2, 5, 0), ValueError, "at least one dimension"),
        (torch.zeros(1, 2, 3, 4), torch.full((2, 5, 4), torch.inf), ValueError, "must be finite"),
    ],
)
def test_bad_input_is_refused_by_name(k, codebook, error, message):
    with pytest.raises(error, match=message):
        ops.vq_assign(k, codebook)
