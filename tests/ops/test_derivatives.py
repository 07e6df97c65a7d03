"""The derivatives that the operators have, and errors for those that they do not have, instead of a silent zero."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longvq_layers import LongVQBlock, S4DLayer, ops
from tests.native import drawn

BACKENDS = ("auto", "torch")
U, MODES, WEIGHT = torch.randn(2, 40, 3), -torch.rand(3, 4), torch.randn(3, 4)
QKV, CODEBOOK = torch.randn(3, 1, 2, 20, 4), torch.randn(2, 5, 4)


def scan(u, backend, **options):
    return ops.ssm_scan(u, MODES, WEIGHT, backend=backend, **options)


def attend(q, backend):
    return ops.vq_attention(q, *QKV[1:], CODEBOOK, causal=True, window=3, backend=backend)


# PyTorch's forward mode itself uses deprecated functions.
own_warning = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "x"), [(scan, U), (attend, QKV[0])])
def test_double_backward_is_refused(call, x, backend):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(x, backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'double backward is not supported .*backend="reference"'):
        torch.autograd.grad(grad.square().sum(), x)
    (grad,) = torch.autograd.grad(call(x, "reference").square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


@own_warning
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend):
    for call, x in ((scan, U), (attend, QKV[0])):
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            torch.func.jvp(lambda x, call=call: call(x, backend), (x,), (torch.ones_like(x),))
    state = torch.zeros(2, 3, 4)
    with pytest.raises(NotImplementedError, match="ssm_step: forward-mode"):
        torch.func.jvp(
            lambda u: ops.ssm_step(u, MODES.exp(), WEIGHT, state, backend=backend)[0], (U[:, 0],), (U[:, 1],)
        )
    _, tangent = torch.func.jvp(lambda u: scan(u, "reference"), (U,), (U,))
    assert torch.allclose(tangent, scan(U, backend), atol=1e-4)  # linear in u


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [S4DLayer(8, d_state=6), LongVQBlock(8, num_codes=4, window=4, d_state=4).eval()])
def test_checkpointing_gives_the_same_gradients(layer, reentrant):
    x = torch.randn(2, 30, 8, requires_grad=True)
    leaves = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), leaves)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, expected) for leaf, expected in zip(leaves, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(range(5), n)])
def test_any_subset_of_gradients(backend, wanted):
    arguments = drawn(2, 70, 3, 4).arguments

    def gradients(names):
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in arguments.items()}
        y, state = ops.ssm_scan(**leaves, return_state=True, backend=backend)
        loss = y.square().sum() + torch.view_as_real(state).square().sum()
        return dict(zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True))

    names = [list(arguments)[i] for i in wanted]
    everything = gradients(list(arguments))
    assert all(torch.equal(grad, everything[name]) for name, grad in gradients(names).items())


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_are_like_real_ones(namespace, dtype):
    """Shapes, strides and dtypes: transposed parameters, no optional arguments, only some gradients."""
    u, grad = torch.randn(2, 40, 3).to(dtype), torch.randn(2, 40, 3).to(dtype)
    modes, state = -torch.rand(4, 3).t(), torch.randn(4, 2, 3).permute(1, 2, 0)
    backward = getattr(torch.ops, namespace).ssm_scan_backward.default
    for skip, initial, needed in itertools.product(
        (None, torch.randn(3)), (None, state), ((True, True), (True, False))
    ):
        for need in (needed, needed[::-1]):
            torch.library.opcheck(
                backward,
                (grad, state, u, modes, modes, skip, initial, None, None, False, *need),
                test_utils=("test_schema", "test_faketensor"),
            )
    step = getattr(torch.ops, namespace).ssm_step.default
    torch.library.opcheck(
        step, (u[:, 0], modes.exp(), modes, None, state), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("length", [0, 5])
def test_the_returned_state_is_never_the_callers(backend, length):
    for dtype in (torch.float32, torch.float64):
        state, modes = torch.randn(2, 3, 2, dtype=dtype), -torch.rand(3, 2, dtype=dtype)
        before = state.clone()
        u = torch.zeros(2, length, 3, dtype=dtype)
        ops.ssm_scan(u, modes, modes, initial_state=state, return_state=True, backend=backend)[1].zero_()
        assert torch.equal(state, before)


def test_half_subnormals_survive_flush_to_zero():
    u = torch.full((1, 2, 3), 3e-6, dtype=torch.float16)
    expected = ops.ssm_scan(u, torch.full((3, 1), -50.0), torch.ones(3, 1))
    assert expected.abs().min() > 0
    assert torch.set_flush_denormal(True)
    try:
        flushed = ops.ssm_scan(u, torch.full((3, 1), -50.0), torch.ones(3, 1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed, expected)


@own_warning
def test_long_conv_has_vmap_and_forward_mode():
    u, kernel = torch.randn(4, 1, 40, 5), torch.randn(5, 40)
    together = torch.vmap(lambda u: ops.long_conv(u, kernel))(u)
    assert torch.allclose(together, torch.stack([ops.long_conv(x, kernel) for x in u]), atol=1e-5)
    _, tangent = torch.func.jvp(lambda u: ops.long_conv(u, kernel), (u[0],), (u[1],))
    assert torch.allclose(tangent, ops.long_conv(u[1], kernel), atol=1e-5)
