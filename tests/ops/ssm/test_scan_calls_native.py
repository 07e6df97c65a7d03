"""The compiled scan apart from its values: threads, rows, NaN and infinity, autograd, memory, wrong calls."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from longvq_layers import ops
from tests.native import drawn, run, threads


def results(case) -> dict[str, Tensor]:
    return run(case.leaves(), "native", case)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(("batch", "channels"), [(5, 40), (1, 100), (70, 5)])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_threads_and_repetition_change_nothing(batch, channels, complex_modes):
    case = drawn(batch, 420, channels, 3, complex_modes)
    with threads(1):
        expected = results(case)
    for count in (1, 2, 3, 8):
        with threads(count):
            assert not differing(results(case), expected), count
    torch.use_deterministic_algorithms(True)
    try:
        assert not differing(results(case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inner", [1, 2])
def test_several_python_threads_at_once(inner):
    """Each thread with its own inputs, then all with the same. On the CPU, autograd runs in the calling thread."""
    cases = [drawn(3, 300, 20, 1 + i, bool(i % 2)) for i in range(4)]
    wrong = []
    with threads(inner):
        expected = [results(case) for case in cases]

    def work(index: int) -> None:
        torch.set_num_threads(inner)
        for i in [index] * 5 + [0] * 5:
            wrong.extend(differing(results(cases[i]), expected[i]))

    with threads(inner):
        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_a_row_gets_the_same_alone_as_in_a_batch(batch, complex_modes):
    case = drawn(batch, 600, 18, 3, complex_modes, torch.bfloat16)
    whole = results(case)
    for row in (0, batch // 2, batch - 1):
        one = slice(row, row + 1)
        alone = drawn(1, 600, 18, 3, complex_modes, torch.bfloat16)
        alone.arguments = {n: x[one] if n in ("u", "initial_state") else x for n, x in case.arguments.items()}
        alone.options = {**case.options, "key_padding_mask": case.options["key_padding_mask"][one]}
        alone.grad_y, alone.grad_state = case.grad_y[one], case.grad_state[one]
        for name, value in results(alone).items():
            if name in ("y", "state", "u", "initial_state"):
                assert torch.equal(value, whole[name][one]), name


def test_a_channel_gets_the_same_alone_as_among_others():
    case = drawn(2, 200, 37, 3)
    whole = results(case)
    axes = {"u": 2, "log_decay": 0, "weight": 0, "skip": 0, "initial_state": 1, "y": 2, "state": 1}
    for channel in (0, 7, 15, 16, 36):
        alone = drawn(2, 200, 1, 3)
        alone.arguments = {n: x.narrow(axes[n], channel, 1) for n, x in case.arguments.items()}
        alone.options = case.options
        alone.grad_y, alone.grad_state = case.grad_y[..., channel, None], case.grad_state[:, channel, None]
        for name, value in results(alone).items():
            assert torch.equal(value, whole[name].narrow(axes[name], channel, 1)), name


# Positions in the first chunk, at ends of chunks, in a later tile and segment, in the unfinished last chunk.
BAD_TIMES = [0, 5, 31, 32, 62, 390, 640, 644]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("modes", [1, 2, 3])
@pytest.mark.parametrize("complex_modes", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_number_that_is_not_finite_stays_in_its_channel_and_in_its_future(bad, modes, complex_modes, reverse):
    """Earlier outputs, and all other channels and rows, do not change by a single bit."""
    case = drawn(2, 645, 5, modes, complex_modes, reverse=reverse)
    case.options["key_padding_mask"] = None
    clean = results(case)
    u, grad_y = case.arguments["u"], case.grad_y
    for t in BAD_TIMES:
        case.arguments["u"], case.grad_y = u.clone(), grad_y.clone()
        case.arguments["u"][1, t, 2] = bad
        case.grad_y[1, t, 2] = bad
        actual = results(case)
        assert not actual["y"][1, t, 2].isfinite() and not actual["u"][1, t, 2].isfinite()
        # The forward may change from t on, the adjoint up to t.
        after, before = (slice(t, None), slice(None, t + 1)) if not reverse else (slice(None, t + 1), slice(t, None))
        actual["y"][1, after, 2], actual["u"][1, before, 2] = clean["y"][1, after, 2], clean["u"][1, before, 2]
        for name in ("state", "initial_state"):
            actual[name][1, 2] = clean[name][1, 2]
        for name in ("log_decay", "weight", "skip"):
            actual[name][2] = clean[name][2]
        assert not differing(actual, clean), t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_numbers_vanish_whatever_they_are(dtype):
    case = drawn(2, 200, 18, 3, dtype=dtype)
    mask = case.options["key_padding_mask"]
    expected = results(case)
    assert mask.any() and expected["y"][mask].eq(0).all() and expected["u"][mask].eq(0).all()
    case.arguments["u"][mask], case.grad_y[mask] = torch.nan, torch.inf
    assert not differing(results(case), expected)


@pytest.mark.parametrize("complex_modes", [False, True])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_large_and_small_numbers(complex_modes, size):
    """If the result fits into float32, no intermediate number overflows, and small terms are not lost."""
    case = drawn(2, 400, 18, 3, complex_modes)
    case.arguments["u"] *= size
    case.arguments["initial_state"] *= size
    actual = results(case)
    exact = run(case.plain_leaves(torch.float64), "torch", case)
    for name, value in actual.items():
        assert torch.view_as_real(value).isfinite().all() if value.is_complex() else value.isfinite().all(), name
        assert (value - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_each_output_alone_gives_its_gradient(complex_modes, reverse):
    case = drawn(2, 70, 5, 3, complex_modes, reverse=reverse)
    leaves = case.leaves()
    y, state = ops.ssm_scan(**leaves, **case.options, return_state=True, backend="native")
    inputs, options = list(leaves.values()), {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    both = torch.autograd.grad((y, state), inputs, (case.grad_y, case.grad_state), **options)
    parts = [torch.autograd.grad(y, inputs, case.grad_y, **options)]
    parts.append(torch.autograd.grad(state, inputs, case.grad_state, **options))
    for name, total, first, second in zip(leaves, both, *parts, strict=True):
        assert (total - first - second).abs().max() <= 1e-5 * (1 + total.abs().max()), name
    # The unused state, and the expanded gradient of a sum.
    alone = ops.ssm_scan(**leaves, **case.options, backend="native")
    for a, b in zip(
        torch.autograd.grad(alone.sum(), inputs), torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True
    ):
        assert torch.equal(a, b)


def test_used_twice_gradients_add_up():
    case = drawn(2, 70, 5, 3)
    leaves = case.leaves()
    once, other = (ops.ssm_scan(**leaves, **case.options, backend="native") for _ in range(2))
    single = torch.autograd.grad(once.square().sum(), list(leaves.values()), retain_graph=True)
    double = torch.autograd.grad((once * once + other * other).sum(), list(leaves.values()))
    for a, b in zip(single, double, strict=True):
        assert torch.allclose(2 * a, b, rtol=1e-6)


def test_parameters_without_gradients():
    """As in fine-tuning: arguments without requires_grad get no gradient, the other gradients do not change."""
    case = drawn(2, 70, 5, 3)
    expected = results(case)["u"]
    leaves = {n: x.requires_grad_(n == "u") for n, x in case.leaves().items()}
    pair = ops.ssm_scan(**leaves, **case.options, return_state=True, backend="native")
    assert torch.equal(*(torch.autograd.grad(pair, leaves["u"], (case.grad_y, case.grad_state))), expected)


@pytest.mark.parametrize("complex_modes", [False, True])
def test_compiles_without_graph_breaks(complex_modes):
    case = drawn(2, 70, 5, 3, complex_modes)

    def call(u, log_decay, weight, skip, initial_state):
        options = {**case.options, "initial_state": initial_state, "return_state": True, "backend": "native"}
        y, state = ops.ssm_scan(u, log_decay, weight, skip=skip, **options)
        return y.square().sum() + torch.view_as_real(state).sum() if complex_modes else y.square().sum() + state.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    pairs = []
    for function in (compiled, call):
        leaves = list(case.leaves().values())
        loss = function(*leaves)
        pairs.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_operators_that_opcheck_sees_are_the_compiled_ones():
    """test_scan.py checks torch.ops.longvq.*, so these must be the compiled kernels, not the PyTorch defaults."""
    for name in ("ssm_scan", "ssm_scan_backward", "ssm_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"longvq::{name}", "CPU")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"longvq_torch::{name}", "CPU")


def test_no_tensor_but_the_results_is_made():
    case = drawn(2, 2000, 16, 32)
    leaves, outputs = case.leaves(), None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outputs = ops.ssm_scan(**leaves, **case.options, return_state=True, backend="native")
        gradients = torch.autograd.grad(outputs, list(leaves.values()), (case.grad_y, case.grad_state))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    results = sum(x.numel() * x.element_size() for x in (*outputs, *gradients))
    # The check that log_decay ≤ 0 makes a tensor of its size.
    assert results <= allocated <= results + 2 * leaves["log_decay"].numel() * 8, (allocated, results)


_PEAK = """
import resource, torch
from longvq_layers import _extension, ops
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def call(length):
    u = torch.ones(1, length, 16).requires_grad_()
    y = ops.ssm_scan(u, log_decay, log_decay, backend="native")
    gradients = torch.autograd.grad(y, (u, log_decay), torch.ones(1, 1, 1).expand_as(y))
    return sum(x.numel() * x.element_size() for x in (u, y, *gradients))
log_decay = (-0.1 * torch.ones(16, 64) + 1j * torch.ones(16, 64)).requires_grad_()
call(1000)
before = peak()
results = call(1_000_000)
print(peak() - before - results)
"""


@pytest.mark.slow
def test_scratch_memory_does_not_grow_with_the_length():
    """No buffer of modes times length, nor of the length: one segment of chunks for each thread."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 2**20  # bytes; y alone has 64 MB


U, MODES, STATE = torch.zeros(2, 5, 3), torch.zeros(3, 4), torch.zeros(2, 3, 4)
SKIP, MASK = torch.zeros(3), torch.zeros(2, 5, dtype=torch.bool)
GOOD = {"u": U, "log_decay": MODES, "weight": MODES, "skip": SKIP, "initial_state": STATE, "mask": MASK, "packed": None}
BAD = {
    "double u": {"u": U.double()},
    "integer u": {"u": U.int()},
    "complex u": {"u": U.cfloat()},
    "rank of u": {"u": U[0]},
    "channels": {"u": torch.zeros(2, 5, 4)},
    "double modes": {"log_decay": MODES.double(), "weight": MODES.double(), "initial_state": STATE.double()},
    "half modes": {"log_decay": MODES.half(), "weight": MODES.half(), "initial_state": STATE.half()},
    "complex128 modes": {"log_decay": MODES.cdouble(), "weight": MODES.cdouble(), "initial_state": STATE.cdouble()},
    "no modes": {"log_decay": MODES[:, :0], "weight": MODES[:, :0], "initial_state": STATE[..., :0]},
    "rank of log_decay": {"log_decay": MODES[0]},
    "rank of weight": {"weight": MODES[None]},
    "weight is a vector": {"weight": MODES[0]},
    "fewer weights": {"weight": MODES[:, :3]},
    "weight for fewer channels": {"weight": MODES[:2]},
    "weight of another family": {"weight": MODES.cfloat()},
    "short skip": {"skip": SKIP[:2]},
    "rank of skip": {"skip": SKIP[None]},
    "double skip": {"skip": SKIP.double()},
    "state of fewer rows": {"initial_state": STATE[:1]},
    "state of fewer modes": {"initial_state": STATE[..., :3]},
    "rank of the state": {"initial_state": STATE[0]},
    "state of another family": {"initial_state": STATE.cfloat()},
    "short mask": {"mask": MASK[:, :4]},
    "mask of fewer rows": {"mask": MASK[:1]},
    "rank of the mask": {"mask": MASK[0]},
    "float mask": {"mask": MASK.float()},
}


@pytest.mark.parametrize("name", BAD)
def test_the_kernel_itself_refuses_what_would_read_out_of_bounds(name):
    arguments = [*{**GOOD, **BAD[name]}.values(), False]
    with pytest.raises(RuntimeError, match="ssm_scan: "):
        torch.ops.longvq.ssm_scan(*arguments)
    with pytest.raises(RuntimeError, match="ssm_scan: "):
        torch.ops.longvq.ssm_scan_backward(arguments[0], STATE, *arguments, True, True)


BAD_GRAD_Y = [U[:1], U[:, :4], U[..., :2], U[0], U.double(), U.bfloat16()]
BAD_GRAD_STATE = [STATE[:1], STATE[:, :2], STATE[..., :3], STATE[0], STATE.cfloat()]


@pytest.mark.parametrize(
    ("grad_y", "grad_state"), [*[(grad, STATE) for grad in BAD_GRAD_Y], *[(U, grad) for grad in BAD_GRAD_STATE]]
)
def test_the_kernel_itself_refuses_gradients_of_another_shape_or_type(grad_y, grad_state):
    torch.ops.longvq.ssm_scan_backward(U, STATE, *GOOD.values(), False, True, True)
    with pytest.raises(RuntimeError, match="ssm_scan: grad_"):
        torch.ops.longvq.ssm_scan_backward(grad_y, grad_state, *GOOD.values(), False, True, True)
