"""MegaBlock: its attention against the dense definition, chunks, padding, options and initial values."""

import copy
import itertools
import math

import pytest
import torch

from longvq_layers.layers import MegaBlock, optimizer_groups
from longvq_layers.layers.attention.gated import GatedAttention
from longvq_layers.layers.attention.relative_bias import RotaryRelativeBias, SimpleRelativeBias
from tests.layers.published import published_mega
from tests.tolerances import assert_close

DIM, VALUE, CHUNK = 4, 5, 4
each_activation = pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make(activation, causal, chunk=CHUNK, bias="simple", **options):
    attention = GatedAttention(
        DIM,
        chunk=chunk,
        causal=causal,
        activation=activation,
        rel_pos_bias=bias,
        max_positions=32,
        dtype=torch.float64,
        **options,
    ).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


def inputs(batch=2, length=11):
    return [torch.randn(batch, length, d, dtype=torch.float64, requires_grad=True) for d in (DIM, DIM, VALUE)]


def dense(attention, q, k, v, mask):
    """The definition, row by row and chunk by chunk from each row's first unmasked token, without masked tokens."""
    state = {f"mega_layer.rel_pos_bias.{name}": p for name, p in attention.bias.named_parameters()}
    rows = []
    for b in range(len(q)):
        out = [torch.zeros_like(v[b, :0])]
        real = [t for t in range(q.shape[1]) if not mask[b, t]]
        start = real[0] if real else q.shape[1]
        out.append(torch.zeros_like(v[b, :start]))
        chunk = attention.chunk or len(mask[b]) + 1
        for first in range(start, q.shape[1], chunk):
            at = slice(first, min(first + chunk, q.shape[1]))
            size = at.stop - at.start
            past = torch.ones(size, size).tril().bool() if attention.causal else torch.ones(size, size).bool()
            allowed = past & ~mask[b, at]
            bias = published_mega.position_bias(state, size)
            scores = q[b, at] @ k[b, at].T
            if attention.activation == "softmax":
                scores = (scores / DIM**0.5 + bias).masked_fill(~allowed, -1e300)
                weights = scores.softmax(-1) * allowed
            else:
                scores = scores / allowed.sum(-1, keepdim=True).clamp(min=1) + bias
                mu, sigma = 0.5**0.5, (0.25 / math.pi) ** 0.5
                laplace = (1 + torch.erf((scores - mu) / (sigma * 2**0.5))) / 2
                weights = (laplace if attention.activation == "laplace" else scores.relu() ** 2) * allowed
            out.append(weights @ v[b, at])
        rows.append(torch.cat(out))
    return torch.stack(rows)


def masks(length=11):
    left, holes = torch.arange(length) < torch.tensor([[3], [6]]), torch.rand(2, length) < 0.4
    return {"none": torch.zeros(2, length, dtype=torch.bool), "left": left, "right": left.flip(1), "holes": holes}


@each_activation
@each_direction
@pytest.mark.parametrize("chunk", [None, CHUNK, 1, 20])
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_attention_equals_the_definition(activation, causal, chunk, kind):
    mask = masks()[kind]
    attention, leaves = make(activation, causal, chunk, bias="rotary" if chunk == 20 else "simple"), inputs()
    onto = torch.randn(2, 11, VALUE, dtype=torch.float64) * ~mask.unsqueeze(-1)
    y, expected = attention(*leaves, None if kind == "none" else mask), dense(attention, *leaves, mask)
    assert_close(y[~mask], expected[~mask], "output")
    variables = [*leaves, *attention.parameters()]
    for a, b in zip(
        torch.autograd.grad(y, variables, onto), torch.autograd.grad(expected, variables, onto), strict=True
    ):
        assert_close(a, b, "gradient")


@each_activation
@pytest.mark.parametrize("offsets", [[0, 11], [0, 0, 3, 3, 9, 10, 11], [0, 4, 8, 11]])
@pytest.mark.parametrize("chunk", [None, 3])
def test_packed_documents_equal_rows(activation, offsets, chunk):
    attention, leaves, mask = make(activation, True, chunk), inputs(batch=1), torch.rand(1, 11) < 0.2
    mask[0, 4] = True  # the first token of a document
    y = attention(*leaves, mask, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    for start, end in itertools.pairwise(offsets):
        at = slice(start, end)
        expected = dense(attention, *(x[:, at] for x in leaves), mask[:, at])
        keep = ~mask[:, at]
        assert_close(y[:, at][keep], expected[keep], "document")


@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_all_rows_share_one_bias_matrix(chunk, monkeypatch):
    shapes, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask, **options):
        shapes.append(tuple(attn_mask.shape))
        return plain(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attention, mask = make("softmax", True, chunk), masks()["left"]
    attention(*inputs(), mask)
    attention(*inputs())
    assert all(len(shape) == 2 and shape[0] == shape[1] <= (chunk or 11) for shape in shapes) and shapes


def test_chunks_do_not_see_each_other():
    attention, (q, k, v) = make("softmax", False), inputs()
    y = attention(q, k, v)
    changed = attention(q, k + (torch.arange(11) >= 8).view(-1, 1), v + (torch.arange(11) >= 8).view(-1, 1))
    assert torch.equal(y[:, :8], changed[:, :8]) and not torch.allclose(y[:, 8:], changed[:, 8:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_activation
def test_padding_is_exact_and_finite_under_autocast(dtype, activation):
    block = MegaBlock(16, chunk=4, activation=activation)
    x, mask = torch.randn(3, 10, 16), torch.arange(10) >= torch.tensor([[10], [3], [0]])
    with torch.autocast("cpu", dtype):
        y, alone = block(x, mask), block(x[1:2, :3])
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert (y[2] == 0).all() and torch.allclose(y[1, :3].float(), alone[0].float(), atol=2e-2)


def test_biases_equal_the_published_ones():
    simple, rotary = SimpleRelativeBias(7, dtype=torch.float64), RotaryRelativeBias(6, dtype=torch.float64)
    for bias in (simple, rotary):
        for parameter in bias.parameters():
            torch.nn.init.normal_(parameter)
        state = {f"mega_layer.rel_pos_bias.{name}": p.detach() for name, p in bias.named_parameters()}
        for length in (1, 4, 7):
            expected = published_mega.position_bias(state, length)
            assert_close(bias(length), expected, "bias")
            positions = torch.arange(length)
            assert_close(bias.rows(positions, length), expected, "rows")
    rotary.bfloat16()
    assert rotary.table(3).dtype == torch.float32  # bfloat16 can't represent the angles
    with pytest.raises(ValueError, match="max_positions = 7, got 8"):
        simple(8)
    with pytest.raises(ValueError, match="dim must be even"):
        RotaryRelativeBias(3)


def test_a_simple_bias_limits_the_length_unless_there_are_chunks():
    x = torch.randn(1, 40, 16)
    with pytest.raises(ValueError, match="max_positions = 32, got 40"):
        MegaBlock(16, rel_pos_bias="simple", max_positions=32)(x)
    assert MegaBlock(16, rel_pos_bias="simple", max_positions=32, chunk=8)(x).shape == x.shape
    assert MegaBlock(16)(x).shape == x.shape


def test_initial_values_and_optimizer_groups():
    block = MegaBlock(64, chunk=8)
    assert (block.d_attn, block.d_value, block.d_ff, block.ema.ndim) == (32, 128, 128, 16)
    for layer in (block.v_proj, block.mx_proj, block.h_proj, block.ffn.up, block.ffn.down):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    assert block.gamma.std().item() == pytest.approx(0.02, rel=0.4) and not block.beta.any()
    groups = {g["name"]: {id(p) for p in g["params"]} for g in optimizer_groups(block, lr=1e-3, weight_decay=0.1)}
    decayed = {name for name, p in block.named_parameters() if id(p) in groups["decay"]}
    assert decayed == {f"{name}.weight" for name in ("v_proj", "mx_proj", "h_proj", "ffn.up", "ffn.down")}


def test_each_dropout_is_in_its_place():
    x = torch.randn(2, 9, 16)
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.9}, {"hidden_dropout": 0.5}):
        for activation in ("softmax", "laplace"):
            block = MegaBlock(16, d_ff=0, activation=activation, **options)
            with torch.no_grad():  # with initial values attention is too small to see its dropout
                block.h_proj.weight.mul_(50)
            assert (block(x) - block(x)).abs().max() > 1e-4, options
            assert torch.equal(block.eval()(x), block(x))
    assert MegaBlock(16, dropout=0.3).hidden_dropout.p == 0.3
    block = MegaBlock(16, d_ff=0, hidden_dropout=0.5, dropout_type="feature")
    seen = []
    block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    block(x)
    assert set((seen[0] == 0).sum(1).unique().tolist()) == {0, 9}  # V loses whole channels


@pytest.mark.slow
def test_compiled_equals_eager():
    block = MegaBlock(16, chunk=4, causal=True, rel_pos_bias="simple")
    other, x = copy.deepcopy(block), torch.randn(2, 10, 16)
    mask, offsets = torch.arange(10) >= torch.tensor([[10], [7]]), torch.tensor([0, 3, 10], dtype=torch.int32)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for arguments, options in (((x,), {}), ((x, mask), {}), ((x[:1],), {"cu_seqlens": offsets})):
        y, expected = compiled(*arguments, **options), block(*arguments, **options)
        y.sum().backward()
        expected.sum().backward()
        assert_close(y, expected, "output")
    for a, b in zip(other.parameters(), block.parameters(), strict=True):
        assert_close(a.grad, b.grad, "gradient")


def test_wrong_options_are_named():
    for options, error in (
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": 2.0}, "chunk must be an int"),
        ({"d_attn": 0}, "d_attn must be at least 1"),
        ({"d_attn": 3}, "dim must be even"),
        ({"d_ff": -1}, "d_ff must be at least 0, got -1"),
        ({"max_positions": 0, "rel_pos_bias": "simple"}, "max_positions must be at least 1"),
        ({"activation": "gelu"}, "activation must be one of 'softmax', 'laplace', 'relu2', got 'gelu'"),
        ({"rel_pos_bias": "alibi"}, "rel_pos_bias must be one of 'simple', 'rotary', got 'alibi'"),
        ({"norm": "both"}, "norm must be one of 'pre', 'post'"),
        ({"norm_type": "group"}, "norm_type must be one of"),
        ({"dropout_type": "row"}, "dropout_type must be one of"),
        ({"attention_dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"hidden_dropout": -0.1}, "hidden_dropout must be at least 0 and below 1"),
        ({"ffn_activation": "tanh"}, "activation must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"dtype": torch.int32}, "dtype must be a floating torch dtype"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            MegaBlock(16, **options)
