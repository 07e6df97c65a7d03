"""LocalAttention against its dense definition, and step by step."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers.layers import LocalAttention, LocalAttentionState, optimizer_groups
from longvq_layers.layers.attention.windowed import windowed_attention
from tests.strategies import offsets
from tests.tolerances import assert_close


def dense(q, k, v, window, causal, bias=None, mask=None, cu_seqlens=None):
    """The definition of the layer's attention: a loop over queries."""
    batch, heads, length, width = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    document = [0] * length
    for start in [] if cu_seqlens is None else cu_seqlens.tolist():
        document = [d + (i >= start) for i, d in enumerate(document)]
    out = torch.zeros_like(q)
    for b in range(batch):
        ignored = [False] * length if mask is None else mask[b].tolist()
        for i in range(length):
            keys = [
                j
                for j in range(length)
                if (0 <= i - j < window if causal else abs(i - j) < window)
                and document[i] == document[j]
                and not ignored[j]
            ]
            if ignored[i] or not keys:
                continue
            scores = torch.einsum("hd,hjd->hj", q[b, :, i], k[b, :, keys]) / width**0.5
            if bias is not None:
                scores = scores + bias[:, [i - j if causal else j - i + window - 1 for j in keys]]
            out[b, :, i] = torch.einsum("hj,hjd->hd", scores.softmax(-1), v[b, :, keys])
    return out


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(0, 2))
    length = draw(st.one_of(st.sampled_from([0, 1, 2, 31, 32, 33, 65, 97]), st.integers(0, 120)))
    window = draw(st.one_of(st.sampled_from([1, 2, 33, 64, 200]), st.integers(1, 45)))
    causal, kv_heads, width = draw(st.booleans()), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4]))
    heads = kv_heads * draw(st.integers(1, 2))
    factor = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3]))
    q, k, v = (torch.randn(batch, h, length, width).double() for h in (heads, kv_heads, kv_heads))
    columns = window if causal else 2 * window - 1
    bias = torch.randn(heads, columns).double() * factor if draw(st.booleans()) else None
    mask = torch.rand(batch, length) < draw(st.sampled_from([0.1, 0.5, 0.95, 1.0])) if draw(st.booleans()) else None
    cuts = draw(offsets(length)) if packed else None
    return (q * factor).requires_grad_(), k.requires_grad_(), v.requires_grad_(), window, causal, bias, mask, cuts


@given(cases())
@settings(max_examples=60)
def test_equals_the_dense_definition_with_gradients(case):
    q, k, v, window, causal, bias, mask, cuts = case
    leaves = [q, k, v] if bias is None else [q, k, v, bias.requires_grad_()]
    options = {"window": window, "causal": causal, "bias": bias}
    out = windowed_attention(q, k, v, **options, key_padding_mask=mask, cu_seqlens=cuts)
    expected = dense(q, k, v, window, causal, bias, mask, cuts)
    if mask is not None:  # the output of a masked query is up to the caller
        itself = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        assert_close(out.transpose(1, 2)[mask], itself.transpose(1, 2)[mask], "out of masked queries")
        out = out.masked_fill(mask[:, None, :, None], 0)
    assert_close(out, expected, "out")
    onto = torch.randn_like(out)
    found, wanted = (
        torch.autograd.grad((y * onto).sum() + 0 * sum(x.sum() for x in leaves), leaves) for y in (out, expected)
    )
    for name, a, b in zip("qkvb", found, wanted, strict=False):
        assert_close(a, b, f"gradient of {name}")


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    layer = LocalAttention(4, 2, window=3, causal=causal, num_kv_heads=1, dtype=torch.float64)
    torch.nn.init.normal_(layer.window_bias)
    mask = torch.zeros(1, 35, dtype=torch.bool)
    mask[0, [0, 7, 34]] = True
    x, onto = torch.randn(1, 35, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    bias = layer.window_bias

    def run(x, bias):
        return torch.func.functional_call(layer, {"window_bias": bias}, (x, mask)) @ onto

    assert torch.autograd.gradcheck(run, (x, bias.detach().requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [5, 150])
def test_the_layer_projects_around_the_definition(causal, length):
    layer = LocalAttention(8, 4, window=7, causal=causal, num_kv_heads=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.window_bias)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = layer.out_proj(dense(q, k, v, 7, causal, layer.window_bias).transpose(1, 2).flatten(2))
    assert_close(layer(x), expected, "y")


@pytest.mark.parametrize("causal", [True, False])
def test_positions_outside_the_window_have_no_influence(causal):
    layer = LocalAttention(8, 2, window=5, causal=causal, dtype=torch.float64)
    x = torch.randn(1, 90, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 40] += 1
    seen = (layer(changed) - layer(x)).abs().sum((0, 2)).nonzero().flatten().tolist()
    assert seen == list(range(40 if causal else 36, 45))


def test_a_window_of_one_gives_the_value_itself():
    layer = LocalAttention(8, 2, window=1, causal=True)
    x = torch.randn(2, 70, 8)
    assert_close(layer(x), layer.out_proj(layer.v_proj(x)), "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_scores_stay_finite(dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 80, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.full((2, 17), -3e4, dtype=dtype, requires_grad=True)
    mask = torch.rand(1, 80) < 0.5
    for m in (None, mask):
        out = windowed_attention(q * 100, k * 100, v, window=9, causal=False, bias=bias, key_padding_mask=m)
        out.sum().backward()
        assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v, bias))


def test_memory_is_linear_in_the_length():
    seen = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim():
                seen.append(out.untyped_storage().nbytes())
            return out

    layer = LocalAttention(8, 2, window=16, causal=True)
    sizes = []
    for length in (2048, 4096):
        seen.clear()
        with Largest():
            layer(torch.randn(1, length, 8), torch.zeros(1, length, dtype=torch.bool))
        sizes.append(max(seen))
    assert sizes[1] <= 2.1 * sizes[0]


def test_steps_equal_forward():
    for window, dtype in ((1, torch.float32), (2, torch.float64), (40, torch.float32)):
        layer = LocalAttention(8, 4, window=window, causal=True, num_kv_heads=2, dtype=dtype).eval()
        torch.nn.init.normal_(layer.window_bias)
        x = torch.randn(2, 110, 8, dtype=dtype)
        with torch.no_grad():
            state, outputs = layer.initial_state(2), []
            size = state.nbytes
            for part in x.split([70, 0, 1, 30, 9], 1):
                y, same = layer.step(part, state)
                assert same is state
                outputs.append(y)
            assert state.nbytes == size and state.lengths.tolist() == [110, 110]
            one = layer.initial_state(2)
            tokens = [layer.step(x[:, t], one)[0] for t in range(110)]
            expected = layer(x)
        assert_close(torch.cat(outputs, 1), expected, "pieces")
        assert_close(torch.stack(tokens, 1), expected, "tokens")


@given(st.data())
@settings(max_examples=25)
def test_masked_tokens_take_no_position(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    length, window = data.draw(st.integers(0, 60)), data.draw(st.sampled_from([1, 2, 5, 70]))
    layer = LocalAttention(4, 2, window=window, causal=True, dtype=torch.float64).eval()
    torch.nn.init.normal_(layer.window_bias)
    x = torch.randn(3, length, 4, dtype=torch.float64)
    mask = torch.rand(3, length) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    mask[0] = True
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    with torch.no_grad():
        state = layer.initial_state(3)
        untouched = [t[0].clone() for t in state.tensors()]
        filled = x.masked_fill(mask.unsqueeze(-1), torch.nan)
        parts = zip(filled.tensor_split(cuts, 1), mask.tensor_split(cuts, 1), strict=True)
        y = torch.cat([layer.step(part, state, m)[0] for part, m in parts], 1)
        assert (y[mask] == 0).all() and state.lengths.tolist() == (~mask).sum(1).tolist()
        assert all(torch.equal(t[0], old) for t, old in zip(state.tensors(), untouched, strict=True))
        for row in (1, 2):
            mine = ~mask[row]
            assert_close(y[row, mine], layer(x[row : row + 1, mine])[0], "row")


def test_branches_of_a_state():
    layer = LocalAttention(4, 2, window=5, causal=True).eval()
    x = torch.randn(3, 12, 4)
    with torch.no_grad():
        _, state = layer.step(x, layer.initial_state(3))
        picked, kept = state.index_select(torch.tensor([2, 0])), state.clone()
        expected, _ = layer.step(x[:, 3], state.clone())
        y, _ = layer.step(x[[2, 0], 3], picked)
    assert_close(y, expected[[2, 0]], "y")
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors(), state.tensors(), strict=True))
    assert isinstance(copy.deepcopy(state), LocalAttentionState)
    with pytest.raises(TypeError, match=r"rows must be int64 or int32, got torch\.bool"):
        state.index_select(torch.tensor([True, False, True]))


def test_refusals():
    causal, both = LocalAttention(4, 2, window=3, causal=True).eval(), LocalAttention(4, 2).eval()
    state, x = causal.initial_state(2), torch.randn(2, 4)
    for call in (lambda: both.initial_state(2), lambda: both.step(x, state)):
        with pytest.raises(NotImplementedError, match="causal=True"):
            call()
    with pytest.raises(NotImplementedError, match="no_grad"):
        causal.step(x, state)
    with torch.no_grad():
        for wrong, error, message in (
            ((x[:, :3], state), ValueError, "x must have shape"),
            ((x.double(), state), TypeError, "dtype of the layer"),
            ((x, None), TypeError, "state must be of type LocalAttentionState"),
            ((x[:1], state), ValueError, r"state\.keys must have shape"),
            ((x, state, torch.zeros(2, 1, dtype=torch.bool)), ValueError, "key_padding_mask must have 1 dim"),
        ):
            with pytest.raises(error, match=message):
                causal.step(*wrong)
        with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
            causal.train().step(x, state)
    assert not any(t.any() for t in state.tensors())
    for wrong, error in (({"window": 0}, ValueError), ({"window": 2.0}, TypeError), ({"num_kv_heads": 3}, ValueError)):
        with pytest.raises(error, match=next(iter(wrong))):
            LocalAttention(4, 2, **wrong)
    with pytest.raises(TypeError, match="batch must be an int"):
        causal.initial_state(2.0)


def test_the_window_bias_is_not_decayed():
    layer = LocalAttention(4, 2)
    groups = {group["name"]: group["params"] for group in optimizer_groups(layer, lr=1e-3, weight_decay=0.1)}
    assert any(p is layer.window_bias for p in groups["no_decay"])
    assert LocalAttention(4, 2, window_bias=False)(torch.randn(1, 70, 4)).shape == (1, 70, 4)


@pytest.mark.slow
def test_one_compiled_graph_serves_all_lengths():
    layer = LocalAttention(8, 2, window=5, causal=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (100, 128, 301):  # with and without a partial last block
        x = torch.randn(2, length, 8)
        assert_close(compiled(x), layer(x), f"y of length {length}")
