"""Documents packed into one row give the values and gradients of each document alone, for any lengths."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longvq_layers import ops
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import attention_cases, scan_cases
from tests.tolerances import assert_close


def spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random objective. An empty document does not use all outputs and leaves."""
    torch.manual_seed(1)
    pairs = [(x, torch.randn(x.shape, dtype=torch.cdouble if x.is_complex() else torch.double)) for x in outputs]
    outputs, grads = zip(*[(x, grad.to(x.dtype)) for x, grad in pairs if x.requires_grad], strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def attend(case, backend: str, dtype=torch.float64, alone: bool = False) -> dict[str, Tensor]:
    """One packed call, or one call for each document."""
    leaves, options = case.tensors(dtype), dict(case.options, backend=backend)
    q, k, v = (leaves[name] for name in "qkv")
    options["bias"] = leaves.get("bias")
    codes = ops.vq_assign(case.k, case.codebook, backend="reference")  # backends may choose different codes at ties
    if not alone:
        out = ops.vq_attention(q, k, v, case.codebook, **options, codes=codes)
    else:
        parts, mask = [], options.pop("key_padding_mask")
        for at in spans(options.pop("cu_seqlens")) or [slice(0, 0)]:  # no documents: no positions
            part = {"key_padding_mask": None if mask is None else mask[:, at], "codes": codes[:, :, at]}
            rows = (x[:, :, at] for x in (q, k, v))
            parts.append(ops.vq_attention(*rows, case.codebook, **options, **part))
        out = torch.cat(parts, dim=2)
    return {"out": out.detach(), **gradients([out], leaves)}


def scan(case, backend: str, dtype=torch.float64, alone: bool = False) -> dict[str, Tensor]:
    leaves, options = case.tensors(dtype), dict(case.options, backend=backend, return_state=True)
    if not alone:
        outputs = ops.ssm_scan(**leaves, **options)
    else:
        u, start = leaves["u"], leaves.get("initial_state")
        model = {name: leaves.get(name) for name in ("log_decay", "weight", "skip")}
        pairs = [(u[:, :0], model["weight"].new_empty(0, *model["weight"].shape))]
        mask = options.pop("key_padding_mask")
        for n, at in enumerate(spans(options.pop("cu_seqlens"))):
            part = {
                "key_padding_mask": None if mask is None else mask[:, at],
                "initial_state": None if start is None else start[n : n + 1],
            }
            pairs.append(ops.ssm_scan(u[:, at], **model, **options, **part))
        outputs = torch.cat([y for y, _ in pairs], dim=1), torch.cat([state for _, state in pairs])
    found = {"y": outputs[0].detach(), "state": outputs[1].detach()}
    return {**found, **gradients(list(outputs), leaves)}


@given(attention_cases(packed=True))
@settings(max_examples=80)
def test_attention_of_packed_documents_is_that_of_each_alone(case):
    expected = attend(case, "reference", alone=True)
    for backend in ("reference", "torch"):
        for name, value in attend(case, backend).items():
            assert_close(value, expected[name], f"{name}, {backend}")


@given(scan_cases(packed=True))
@settings(max_examples=50)
def test_scan_of_packed_documents_is_that_of_each_alone(case):
    expected = scan(case, "reference", alone=True)
    for backend in ("reference", "torch"):
        for name, value in scan(case, backend).items():
            assert_close(value, expected[name], f"{name}, {backend}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=attention_cases(max_length=90, packed=True))
@settings(max_examples=15)
def test_attention_gives_the_same_in_lower_precisions(dtype, case):
    case.codebook = case.codebook.float()
    for backend in ("torch", "auto"):
        packed, alone = (attend(case, backend, dtype, alone) for alone in (False, True))
        assert torch.equal(packed["out"], alone["out"])
        for name, value in packed.items():
            assert value.dtype == alone[name].dtype
            assert_close(value, alone[name], f"{name}, {backend}", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=scan_cases(max_length=90, packed=True))
@settings(max_examples=15)
def test_scan_gives_the_same_in_lower_precisions(dtype, case):
    for backend in ("torch", "auto"):
        packed, alone = (scan(case, backend, dtype, alone) for alone in (False, True))
        for name, value in packed.items():
            assert value.dtype == alone[name].dtype
            assert_close(value, alone[name], f"{name}, {backend}", dtype=dtype)
            if name in ("y", "state", "initial_state"):
                assert torch.equal(value, alone[name]), (name, backend)


OFFSETS = torch.tensor([0, 40, 40, 41, 130, 200], dtype=torch.int32)
BACKENDS = ("reference", "torch", "auto")
DOCUMENT = slice(41, 130)  # the one that is changed below


def outside(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, 0, DOCUMENT.start), x.narrow(dim, DOCUMENT.stop, 200 - DOCUMENT.stop)], dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_a_document_is_not_seen_by_the_others_in_attention(backend, causal, activation):
    q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
    codebook = torch.randn(2, 16, 8)

    def call():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        options = {"causal": causal, "window": 60, "activation": activation, "cu_seqlens": OFFSETS, "backend": backend}
        out = ops.vq_attention(*leaves, codebook, **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    before = call()
    for x in (q, k, v):
        x[:, :, DOCUMENT] = 5 * torch.randn(1, 2, 89, 8)
    for a, b in zip(before, call(), strict=True):
        assert torch.equal(outside(a, 2), outside(b, 2))
        assert not torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_document_is_not_seen_by_the_others_in_a_scan(backend, reverse):
    u = torch.randn(1, 200, 3)
    log_decay, weight = torch.full((3, 2), -1e-3), torch.randn(3, 2)

    def call():
        leaf = u.clone().requires_grad_()
        options = {"reverse": reverse, "return_state": True, "cu_seqlens": OFFSETS, "backend": backend}
        y, state = ops.ssm_scan(leaf, log_decay, weight, **options)
        return y.detach(), state.detach(), *torch.autograd.grad(y.square().sum() + state.square().sum(), leaf)

    before = call()
    u[:, DOCUMENT] = torch.inf
    for i, (a, b) in enumerate(zip(before, call(), strict=True)):
        if i == 1:  # the states
            assert torch.equal(a[[0, 1, 2, 4]], b[[0, 1, 2, 4]]) and not torch.equal(a[3], b[3])
        else:
            assert torch.equal(outside(a, 1), outside(b, 1)) and not torch.equal(a, b)


def test_one_document_is_the_whole_row():
    q, k, v = (torch.randn(1, 2, 100, 8) for _ in range(3))
    codebook, whole = torch.randn(2, 16, 8), torch.tensor([0, 100], dtype=torch.int32)
    u, modes = torch.randn(1, 100, 3), -torch.rand(3, 2)
    for backend in BACKENDS:
        row = ops.vq_attention(q, k, v, codebook, window=3, backend=backend)
        assert torch.equal(ops.vq_attention(q, k, v, codebook, window=3, cu_seqlens=whole, backend=backend), row)
        row = ops.ssm_scan(u, modes, modes, backend=backend)
        assert torch.equal(ops.ssm_scan(u, modes, modes, cu_seqlens=whole, backend=backend), row)


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_of_attention(namespace, causal):
    q, k, v = (torch.randn(1, 4, 200, 4, requires_grad=True) for _ in range(3))
    codebook = torch.randn(4, 6, 4)
    bias = torch.randn(4, 3 if causal else 5, requires_grad=True)
    op = getattr(torch.ops, namespace).vq_attention.default
    for offsets, length, options in (
        (OFFSETS, 200, {"bias": bias, "key_padding_mask": torch.rand(1, 200) < 0.2}),
        (OFFSETS[:3], 40, {}),
        (OFFSETS[:1], 0, {"bias": bias}),
    ):
        rows = [x[:, :, :length].detach().requires_grad_() for x in (q, k, v)]
        codes = ops.vq_assign(rows[1], codebook)
        options |= {"cu_seqlens": offsets, "causal": causal, "window": 3}
        torch.library.opcheck(op, attention_arguments(*rows, codebook, codes, **options))


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_opcheck_of_the_scan(namespace, complex_modes):
    op = getattr(torch.ops, namespace).ssm_scan.default
    family = torch.complex64 if complex_modes else torch.float32
    log_decay = (-torch.rand(3, 4)).to(family).requires_grad_()
    weight = torch.randn(3, 4, dtype=family, requires_grad=True)
    skip = torch.randn(3, requires_grad=True)
    for offsets, length, mask in (
        (OFFSETS, 200, torch.rand(1, 200) < 0.2),
        (OFFSETS[:3], 40, None),
        (OFFSETS[:1], 0, None),
    ):
        u = torch.randn(1, length, 3, requires_grad=True)
        state = torch.randn(len(offsets) - 1, 3, 4, dtype=family, requires_grad=True)
        torch.library.opcheck(op, (u, log_decay, weight, skip, state, mask, offsets, True))
        torch.library.opcheck(op, (u, log_decay, weight, None, None, None, offsets, False))
    backward = getattr(torch.ops, namespace).ssm_scan_backward.default
    u, state = torch.randn(1, 200, 3), torch.randn(5, 3, 4, dtype=family)
    model = (log_decay.detach(), weight.detach(), skip.detach())
    for initial, needed in itertools.product((None, state), ((True, True), (True, False), (False, True))):
        arguments = (u, state, u, *model, initial, None, OFFSETS, False, *needed)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_compiles_without_graph_breaks_for_any_documents(backend):
    q, k, v = (torch.randn(1, 4, 200, 8, requires_grad=True) for _ in range(3))
    codebook, modes = torch.randn(4, 16, 8), -torch.rand(8, 4)

    def call(q, k, v, offsets):
        out = ops.vq_attention(q, k, v, codebook, causal=True, window=4, cu_seqlens=offsets, backend=backend)
        u = out.sum(1)
        y, state = ops.ssm_scan(u, modes, modes, cu_seqlens=offsets, return_state=True, backend=backend)
        return y.sum(-1) + u.sum(-1), state

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for offsets in (OFFSETS, torch.tensor([0, 17, 200], dtype=torch.int32)):
        pairs = []
        for function in (compiled, call):
            y, state = function(q, k, v, offsets)
            assert state.shape == (len(offsets) - 1, 8, 4)
            pairs.append((y, state, *torch.autograd.grad(y.square().sum() + state.sum(), (q, k, v))))
        for a, b in zip(*pairs, strict=True):
            assert_close(a, b, "compiled")


Q, CODEBOOK = torch.zeros(1, 2, 5, 8), torch.zeros(2, 4, 8)
U, MODES = torch.zeros(1, 5, 3), -torch.ones(3, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "no tensor": ([0, 5], TypeError, "cu_seqlens must be a torch.Tensor"),
    "rank": (ints(0, 5)[None], ValueError, "cu_seqlens must have 1 dimension"),
    "int64": (torch.tensor([0, 5]), TypeError, r"cu_seqlens must be int32, got torch.int64; use cu_seqlens.int\(\)"),
    "float": (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens must be int32, got torch.float32$"),
    "device": (ints(0, 5).to("meta"), ValueError, "cu_seqlens must be on the device of [qu], cpu, got meta"),
    "no offset": (ints(), ValueError, "cu_seqlens must have at least one offset"),
    "first": (ints(1, 5), ValueError, "cu_seqlens must start with 0, got 1"),
    "last": (ints(0, 2, 4), ValueError, "cu_seqlens must end with the length L = 5, got 4"),
    "beyond": (ints(0, 6), ValueError, "cu_seqlens must end with the length L = 5, got 6"),
    "only one": (ints(0), ValueError, "cu_seqlens must end with the length L = 5, got 0"),
    "falling": (ints(0, 3, 2, 5), ValueError, "cu_seqlens must not decrease, got 3 and then 2 at index 2"),
    "negative": (ints(0, -1, 5), ValueError, "cu_seqlens must not decrease, got 0 and then -1 at index 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_offsets_are_refused_by_name(name):
    offsets, error, message = BAD[name]
    with pytest.raises(error, match=f"vq_attention: {message}"):
        ops.vq_attention(Q, Q, Q, CODEBOOK, cu_seqlens=offsets)
    with pytest.raises(error, match=f"ssm_scan: {message}"):
        ops.ssm_scan(U, MODES, -MODES, cu_seqlens=offsets)


def test_more_rows_than_one_are_refused():
    message = "{} must have a batch of 1 with cu_seqlens, which packs all documents into one row, got 2"
    with pytest.raises(ValueError, match="vq_attention: " + message.format("q")):
        ops.vq_attention(*[Q.expand(2, -1, -1, -1)] * 3, CODEBOOK, cu_seqlens=ints(0, 5))
    with pytest.raises(ValueError, match="ssm_scan: " + message.format("u")):
        ops.ssm_scan(U.expand(2, -1, -1), MODES, -MODES, cu_seqlens=ints(0, 5))


def test_the_initial_state_is_one_for_each_document():
    with pytest.raises(ValueError, match=r"initial_state must have shape \(B, H, N\) = \(2, 3, 2\), got \(1, 3, 2\)"):
        ops.ssm_scan(U, MODES, -MODES, cu_seqlens=ints(0, 2, 5), initial_state=torch.zeros(1, 3, 2))


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("offsets", [ints(0, 6), ints(1, 5), ints(0, 3, 2, 5), ints(0, -1, 5)])
def test_operators_check_offsets(namespace, offsets):
    """A compiled caller can't read the values, so the operators check them."""
    space = getattr(torch.ops, namespace)
    codes = torch.zeros(1, 2, 5, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="vq_attention: cu_seqlens must"):
        space.vq_attention(*attention_arguments(Q, Q, Q, CODEBOOK, codes, cu_seqlens=offsets))
    with pytest.raises((ValueError, RuntimeError), match="ssm_scan: cu_seqlens must"):
        space.ssm_scan(U, MODES, MODES, None, None, None, offsets, False)
    states = torch.zeros(len(offsets) - 1, 3, 2)
    with pytest.raises((ValueError, RuntimeError), match="ssm_scan: cu_seqlens must"):
        space.ssm_scan_backward(U, states, U, MODES, MODES, None, None, None, offsets, False, True, True)
