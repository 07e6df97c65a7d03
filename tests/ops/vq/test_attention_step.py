"""vq_attention_step: on every backend, pieces of any lengths and with any padding equal one call of vq_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.ops.vq.stream import stream_cases
from tests.tolerances import assert_close

BACKENDS = ("reference", "torch")


def sequence(batch=1, heads=2, length=60, head_dim=8, codes=12, dtype=torch.float64, kv_heads=None):
    kv_heads = heads if kv_heads is None else kv_heads
    q = torch.randn(batch, heads, length, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, length, head_dim, dtype=dtype).unbind(0)
    return q, k, v, torch.randn(kv_heads, codes, head_dim, dtype=dtype)


@given(stream_cases(), st.sampled_from(BACKENDS))
@settings(max_examples=100)
def test_pieces_equal_one_call(case, backend):
    out, state = case.pieces(backend)
    assert_close(out, case.at_once(), "out")
    assert torch.equal(state.lengths, case.lengths())
    assert (state.far_counts.sum(-1) == (state.lengths - max(case.window - 1, 0)).clamp(min=0)[:, None]).all()


@given(stream_cases(), st.sampled_from(BACKENDS))
@settings(max_examples=25)
def test_the_state_does_not_depend_on_the_cuts(case, backend):
    state = case.pieces(backend)[1]
    case.cuts = []
    for name, x, y in zip(state.__dataclass_fields__, state.tensors(), case.pieces(backend)[1].tensors(), strict=False):
        assert_close(x.double(), y.double(), name)


@given(stream_cases(max_length=40), st.sampled_from(BACKENDS))
@settings(max_examples=25)
def test_codes_are_those_of_the_nearest_codewords(case, backend):
    assert_close(case.pieces(backend, codes=None)[0], case.pieces(backend)[0], "out")


@pytest.mark.parametrize("backend", (*BACKENDS, "native"))
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("given_codes", [False, True])
def test_other_queries_and_keys_outside_the_window(backend, window, given_codes):
    dtype = torch.float32 if backend == "native" else torch.float64
    q, k, v, _ = sequence(2, 4, 70, kv_heads=2, dtype=dtype)
    _, far_k, _, codebook = sequence(2, 2, 70, head_dim=5, dtype=dtype)
    far_q = torch.randn(2, 4, 70, 5, dtype=dtype)
    codes = ops.vq_assign(far_k, codebook)
    state = ops.vq_attention_state(2, codebook, window=window, value_dim=8, key_dim=8, local_keys="exact")
    assert state.ring_keys.shape[3] == (8 if window else 0)
    pieces = []
    for first, last in ((0, 40), (40, 41), (41, 70)):
        at = slice(first, last)
        pieces.append(
            ops.vq_attention_step(
                *(x[:, :, at] for x in (q, k, v)), codebook, state, far_q=far_q[:, :, at], far_k=far_k[:, :, at],
                codes=codes[:, :, at] if given_codes else None, backend=backend,
            )
        )  # fmt: skip
    expected = ops.vq_attention(
        q, k, v, codebook, far_q=far_q, far_k=far_k, causal=True, window=window, local_keys="exact", backend="reference"
    )
    assert_close(torch.cat(pieces, 2), expected, "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_a_long_piece(backend):
    q, k, v, codebook = sequence(length=600)
    for window in (0, 1, 40, 300):
        state = ops.vq_attention_state(1, codebook, window=window)
        out = ops.vq_attention_step(q, k, v, codebook, state, backend=backend)
        assert_close(out, ops.vq_attention(q, k, v, codebook, causal=True, window=window), f"window {window}")


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_at_their_own_lengths(backend, side):
    dtype = torch.float32 if backend == "auto" else torch.float64
    q, k, v, codebook = sequence(3, 4, 50, kv_heads=2, dtype=dtype)
    lengths, prompt = [50, 7, 0], torch.full((3, 4, 50, 8), torch.nan, dtype=dtype)  # padding may hold anything
    mask, inputs = torch.ones(3, 50, dtype=torch.bool), [prompt.clone(), prompt[:, :2].clone(), prompt[:, :2].clone()]
    for row, n in enumerate(lengths):
        at = slice(50 - n, 50) if side == "left" else slice(0, n)
        mask[row, at] = False
        for padded, x in zip(inputs, (q, k, v), strict=True):
            padded[row, :, at] = x[row, :, :n]
    state = ops.vq_attention_state(3, codebook, window=6)
    out = ops.vq_attention_step(*inputs, codebook, state, key_padding_mask=mask, backend=backend)
    assert (out.movedim(2, 1)[mask] == 0).all() and state.lengths.tolist() == lengths
    more = torch.randn(3, 4, 12, 8, dtype=dtype), *torch.randn(2, 3, 2, 12, 8, dtype=dtype).unbind(0)
    tokens = [
        ops.vq_attention_step(*(x[:, :, t : t + 1] for x in more), codebook, state, backend=backend) for t in range(12)
    ]
    for row, n in enumerate(lengths):
        whole = [
            torch.cat([x[row : row + 1, :, :n], y[row : row + 1]], 2) for x, y in zip((q, k, v), more, strict=True)
        ]
        expected = ops.vq_attention(*whole, codebook, causal=True, window=6, backend="reference")
        assert_close(out[row : row + 1][:, :, ~mask[row]], expected[:, :, :n], f"prompt {row}")
        assert_close(torch.cat(tokens, 2)[row : row + 1], expected[:, :, n:], f"tokens {row}")


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
def test_branches_and_reordered_rows(backend):
    q, k, v, codebook = sequence(3, dtype=torch.float32)
    cut = [[x[:, :, :40], x[:, :, 40:]] for x in (q, k, v)]
    state = ops.vq_attention_state(3, codebook, window=5, local_keys="exact")
    ops.vq_attention_step(*(x[0] for x in cut), codebook, state, backend=backend)
    order = torch.tensor([2, 0, 0, 1])
    branch, chosen = state.clone(), state.index_select(order)
    before = [x.clone() for x in branch.tensors()]
    out = ops.vq_attention_step(*(x[1] for x in cut), codebook, state, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(before, branch.tensors(), strict=True))
    assert torch.equal(ops.vq_attention_step(*(x[1] for x in cut), codebook, branch, backend=backend), out)
    again = ops.vq_attention_step(*(x[1][order] for x in cut), codebook, chosen, backend=backend)
    assert_close(again, out[order], "reordered")
    assert chosen.batch == 4 and chosen.lengths.tolist() == [60] * 4


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
@pytest.mark.parametrize("window", [0, 9])
def test_size_does_not_grow(backend, window):
    q, k, v, codebook = sequence(length=100, dtype=torch.float32)
    state = ops.vq_attention_state(1, codebook, window=window)
    tensors, nbytes = state.tensors(), state.nbytes
    assert nbytes == 4 * (2 * 12 * (8 + 2) + 2 * max(window - 1, 0) * (8 + 2)) + 8
    ops.vq_attention_step(q, k, v, codebook, state, backend=backend)
    assert state.nbytes == nbytes and all(x is y for x, y in zip(tensors, state.tensors(), strict=True))


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("piece", [1, 40])
def test_extremes_stay_finite_and_right(backend, activation, piece):
    q, k, v, codebook = sequence(length=80, dtype=torch.float32)
    for special in ("huge scores", "negative scores", "one code", "equal keys"):
        codes, (q2, k2, table) = 12, (q, k, codebook)
        if special == "huge scores":
            q2 = q * 1e4
        elif special == "negative scores":  # codes without keys must not have the largest score
            q2, k2, table = q.abs(), -300 * k.abs(), -300 * codebook.abs()
            table[:, 0] = 300
        elif special == "one code":
            codes, table = 1, codebook[:, :1]
        else:
            k2 = torch.full_like(k, 0.25)
        assigned = ops.vq_assign(k2, table)
        state, outputs = ops.vq_attention_state(1, table, window=7), []
        assert state.far_counts.shape[2] == codes
        for part in zip(*(x.split(piece, 2) for x in (q2, k2, v, assigned.unsqueeze(3))), strict=True):
            *x, z = part
            out = ops.vq_attention_step(*x, table, state, activation=activation, codes=z.squeeze(3), backend=backend)
            outputs.append(out)
        options = dict(causal=True, window=7, activation=activation, codes=assigned, backend="reference")
        exact, plain = (
            ops.vq_attention(q2.to(t), k2.to(t), v.to(t), table.to(t), **options)
            for t in (torch.float64, torch.float32)
        )
        out = torch.cat(outputs, 2)
        assert out.isfinite().all(), special
        assert (out - exact).abs().max() <= 3 * (plain - exact).abs().max() + 1e-5 * (1 + exact.abs().max()), special


def test_counts_stay_exact_where_float32_would_not():
    q, k, v, codebook = sequence(length=3, codes=1, dtype=torch.float32)
    for backend in (*BACKENDS, "auto"):
        state = ops.vq_attention_state(1, codebook)
        state.far_counts.fill_(2**24)
        ops.vq_attention_step(q, k, v, codebook, state, backend=backend)
        assert (state.far_counts == 2**24 + 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
def test_half_types_are_computed_in_float32(dtype, backend):
    q, k, v, codebook = sequence(dtype=torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state = ops.vq_attention_state(1, codebook, window=5)
    parts = zip(*(x.split([30, 1, 29], 2) for x in (q, k, v)), strict=True)
    out = torch.cat([ops.vq_attention_step(*part, codebook, state, backend=backend) for part in parts], 2)
    expected = ops.vq_attention(*(x.float() for x in (q, k, v)), codebook, causal=True, window=5)
    assert out.dtype == dtype and state.dtype == torch.float32
    assert_close(out.float(), expected.to(dtype).float(), "out", dtype)


@pytest.mark.parametrize("namespace", ["longvq", "longvq_torch"])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("codes", [False, True])
def test_opcheck(namespace, length, codes):
    q, k, v, codebook = sequence(2, 4, length, kv_heads=2, dtype=torch.float32)
    state = ops.vq_attention_state(2, codebook, window=4, local_keys="exact")
    ops.vq_attention_step(q, k, v, codebook, state)
    op = getattr(torch.ops, namespace).vq_attention_step.default
    z, bias, mask = ops.vq_assign(k, codebook) if codes else None, torch.randn(4, 4), torch.rand(2, length) < 0.3
    torch.library.opcheck(op, (q, k, v, codebook, z, bias, mask, None, None, *state.tensors(), 0.5, 4, 0))
    empty = ops.vq_attention_state(2, codebook)
    torch.library.opcheck(op, (q, k, v, codebook, z, None, None, None, None, *empty.tensors(), 0.5, 0, 1))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_compiles_without_graph_breaks(backend):
    q, k, v, codebook = sequence(length=25, dtype=torch.float32)

    def call(q, k, v, state):
        return ops.vq_attention_step(q, k, v, codebook, state, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, theirs = (ops.vq_attention_state(1, codebook, window=4) for _ in range(2))
    with torch.no_grad():
        for part in (slice(0, 20), slice(20, 21), slice(21, 22)):
            x = [x[:, :, part] for x in (q, k, v)]
            assert_close(compiled(*x, theirs), call(*x, ours), "out")
    assert all(torch.equal(x, y) for x, y in zip(ours.tensors(), theirs.tensors(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_works_in_inference_mode_and_under_autocast(backend):
    q, k, v, codebook = sequence(dtype=torch.float32)
    expected = ops.vq_attention(q, k, v, codebook, causal=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        state = ops.vq_attention_state(1, codebook)
        out = ops.vq_attention_step(q.requires_grad_(), k, v, codebook, state, backend=backend)
    assert_close(out, expected, "out")


def test_gradients_are_refused():
    q, k, v, codebook = sequence(length=2)
    state = ops.vq_attention_state(1, codebook, window=2)
    bias = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    for changes in ({"q": q.clone().requires_grad_()}, {"v": v.clone().requires_grad_()}, {"bias": bias}):
        arguments = {"q": q, "k": k, "v": v, "codebook": codebook, "state": state, **changes}
        with pytest.raises(NotImplementedError, match="no_grad"):
            ops.vq_attention_step(**arguments)
        assert state.lengths.item() == 0
        with torch.no_grad():
            ops.vq_attention_step(**arguments)
        state.lengths.zero_()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised by PyTorch itself on first use
def test_forward_mode_is_refused():
    q, k, v, codebook = sequence(length=2)
    state = ops.vq_attention_state(1, codebook)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.vq_attention_step(dual, k, v, codebook, state)
    assert state.lengths.item() == 0


def test_to_keeps_values():
    state = ops.vq_attention_state(2, torch.randn(1, 3, 4), window=4)
    assert [x.device.type for x in state.to("meta").tensors()] == ["meta"] * 6
    assert state.to("cpu").far_sums is state.far_sums and state.device.type == "cpu"


Z = torch.zeros
BAD = {
    "rank of q": (dict(q=Z(2, 1, 8)), ValueError, "q must have 4 dimensions"),
    "integer q": (dict(q=Z(1, 2, 1, 8, dtype=torch.int64)), TypeError, "q must be a real floating-point"),
    "dtype of v": (dict(v=Z(1, 2, 1, 8).half()), TypeError, "v must have the dtype of q"),
    "heads": (dict(q=Z(1, 3, 1, 8)), ValueError, "must be a multiple"),
    "length of k": (dict(k=Z(1, 2, 2, 8)), ValueError, "k must have shape"),
    "head_dim": (dict(q=Z(1, 2, 1, 7), k=Z(1, 2, 1, 7)), ValueError, "codebook must have shape"),
    "head_dim of values": (dict(v=Z(1, 2, 1, 7)), ValueError, "k and v must have"),
    "batch": ({x: Z(2, 2, 1, 8) for x in "qkv"}, ValueError, "k and v must have"),
    "key-value heads": ({x: Z(1, 1, 1, 8) for x in "qkv"}, ValueError, "k and v must have"),
    "codes of the codebook": (dict(codebook=Z(2, 5, 8)), ValueError, "codebook must have shape"),
    "far_q alone": (dict(far_q=Z(1, 2, 1, 8)), ValueError, "far_k must be given with far_q"),
    "head_dim of far_k": (
        dict(far_q=Z(1, 2, 1, 7), far_k=Z(1, 2, 1, 7)),
        ValueError,
        "with H and S of the state and D of far_k",
    ),
    "float64": ({x: Z(1, 2, 1, 8).double() for x in "qkv"}, TypeError, "state must be torch.float64"),
    "state": (dict(state=Z(3)), TypeError, "state must be a VQAttentionState"),
    "bias": (dict(bias=Z(2, 4)), ValueError, "bias must have shape"),
    "mask shape": (dict(key_padding_mask=Z(1, 2, dtype=torch.bool)), ValueError, "key_padding_mask"),
    "mask dtype": (dict(key_padding_mask=Z(1, 1)), TypeError, "key_padding_mask must be bool"),
    "activation": (dict(activation="relu"), ValueError, "'softmax', 'laplace'"),
    "scale with laplace": (dict(activation="laplace", scale=1.0), ValueError, "scale has no effect"),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be a finite number"),
    "codes dtype": (dict(codes=Z(1, 2, 1)), TypeError, "codes must be int64"),
    "codes range": (dict(codes=torch.full((1, 2, 1), 4)), ValueError, "codes must lie in"),
    "device": (dict(v=Z(1, 2, 1, 8, device="meta")), ValueError, "v must be on the device of q"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_leaves_the_state(name):
    changes, error, message = BAD[name]
    state = ops.vq_attention_state(1, Z(2, 4, 8), window=3, local_keys="exact")
    arguments = {x: torch.ones(1, 2, 1, 8) for x in "qkv"} | {"codebook": Z(2, 4, 8), "state": state} | changes
    with pytest.raises(error, match=message):
        ops.vq_attention_step(**arguments)
    assert not any(x.any() for x in state.tensors())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(batch=-1), ValueError, "batch must be at least 0"),
        (dict(batch=1.0), TypeError, "batch must be an int"),
        (dict(value_dim=0), ValueError, "value_dim must be at least 1"),
        (dict(window=-1), ValueError, "window must be 0"),
        (dict(local_keys="both"), ValueError, "local_keys must be one of"),
        (dict(codebook=Z(4, 8)), ValueError, "codebook must have 3 dimensions"),
        (dict(codebook=Z(1, 0, 8)), ValueError, "at least one code"),
        (dict(codebook=torch.full((1, 2, 8), torch.nan)), ValueError, "codebook must be finite"),
    ],
)
def test_bad_states_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.vq_attention_state(**{"batch": 1, "codebook": Z(2, 4, 8), **arguments})


def test_rows_to_select_are_checked():
    state = ops.vq_attention_state(1, Z(2, 4, 8))
    with pytest.raises(TypeError, match="rows must be int64"):
        state.index_select(torch.zeros(1))
