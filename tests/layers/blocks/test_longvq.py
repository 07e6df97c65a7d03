"""LongVQBlock: every option against the equations in plain PyTorch, with a codeword for every key."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvq_layers import ops
from longvq_layers.layers import (
    CodebookAttention,
    DampedEMA,
    DenseAttention,
    DiagonalSSM,
    LongVQBlock,
    commitment_loss,
    optimizer_groups,
)
from tests.layers.blocks.longvq_blocks import LENGTH, OPTIONS, WIDTH, WINDOW, block_of, each_direction, each_option
from tests.tolerances import assert_close


def plain_norm(norm: nn.Module, kind: str, x: Tensor) -> Tensor:
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    if kind == "batch":
        return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    scale = norm.weight if kind == "rms" else norm.scalar
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * scale


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int, causal: bool, kind: str):
    """Dense attention of one head, pair by pair: q, k, v (L, d), with a bias (W,) or (2W − 1,) inside the window."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        keys = range(i + 1) if causal else range(len(k))
        scale = len(keys) ** -1 if kind == "laplace" else q.shape[1] ** -0.5
        scores = []
        for j in keys:
            near = bias is not None and abs(i - j) < window
            scores.append(scale * q[i] @ k[j] + (bias[i - j if causal else j - i + window - 1] if near else 0))
        scores = torch.stack(scores)
        if kind == "softmax":
            weights = scores.softmax(0)
        else:
            mu, sigma = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
            weights = (1 + torch.erf((scores - mu) / (sigma * math.sqrt(2)))) / 2
        out[i] = weights @ v[: len(keys)]
    return out


def plain_block(block: LongVQBlock, x: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Output and keys of one sequence (L, d_model), by the equations of the class with exact keys."""
    heads, pre = options.get("num_heads", 1), options.get("norm", "pre") == "pre"
    kind = options.get("norm_type", "layer")
    inner = plain_norm(block.norm1, kind, x) if pre else x
    z = F.silu(block.ssm(inner[None])[0])
    gates = z if options.get("ssm_gate", True) else inner

    def linear(module: nn.Linear, y: Tensor) -> Tensor:
        return y @ module.weight.T + (0 if module.bias is None else module.bias)

    q, k, v = linear(block.q_proj, z), linear(block.k_proj, z), F.silu(linear(block.v_proj, inner))
    bias, window = block.attention.window_bias, options.get("window", WINDOW)
    activation = options.get("activation", "softmax")
    parts = zip(*(x.chunk(heads, -1) for x in (q, k, v)), [None] * heads if bias is None else bias, strict=True)
    out = torch.cat([plain_attention(*part, window, block.causal, activation) for part in parts], -1)
    gated = F.silu(linear(block.attention_gate, gates)) * out
    u = F.silu(linear(block.candidate_x, inner) + linear(block.candidate_o, gated))
    gate = linear(block.output_gate, gates).sigmoid()
    y = gate * u + (1 - gate) * x
    if not pre:
        y = plain_norm(block.norm1, kind, y)
    if options.get("d_ff", 2 * WIDTH) == 0:
        return y, k
    hidden = linear(block.ffn.up, plain_norm(block.norm2, kind, y) if pre else y)
    act, d_ff = getattr(F, options.get("ffn_activation", "silu")), options.get("d_ff")
    hidden = act(hidden[:, :d_ff]) * hidden[:, d_ff:] if options.get("glu") else act(hidden)
    y = y + linear(block.ffn.down, hidden)
    return y if pre else plain_norm(block.norm2, kind, y), k


@each_option
@each_direction
def test_equals_the_equations(name, causal):
    block = block_of(name, causal)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected, k = plain_block(block, x, OPTIONS[name])
        if block.codebook is not None:
            heads = block.num_heads
            block.codebook.embedding.copy_(k.view(LENGTH, heads, -1).transpose(0, 1))
        assert_close(block(x[None])[0], expected, "output")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "default"])
def test_options_change_the_result_or_the_parameters(name):
    """Otherwise the test above would compare a block with itself."""
    block, default = block_of(name, True), block_of("default", True)
    own, others = ({key: value.shape for key, value in module.state_dict().items()} for module in (block, default))
    if own == others:
        default.load_state_dict(block.state_dict())
        x = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
        assert (block(x) - default(x)).abs().max() > 1e-6


@each_option
def test_repr_reproduces_the_call(name):
    block = block_of(name, True)
    again = eval(f"LongVQBlock({block.extra_repr()})")
    assert repr(again) == repr(block)


def test_options_choose_the_parts_and_their_sizes():
    assert isinstance(LongVQBlock(8).ssm, DiagonalSSM) and isinstance(LongVQBlock(8, ssm="ema").ssm, DampedEMA)
    assert LongVQBlock(8, ssm="ema", ema_dim=5, causal=True).ssm.ndim == 5
    assert LongVQBlock(8, ssm="ema", causal=True, backend="torch").ssm.backend == "torch"
    assert isinstance(LongVQBlock(8).attention, CodebookAttention)
    dense = LongVQBlock(8, num_codes=None)
    assert isinstance(dense.attention, DenseAttention) and dense.codebook is None
    assert LongVQBlock(8, window_bias=False).attention.window_bias is None
    bare = LongVQBlock(8, d_ff=0)
    assert bare.ffn is None and bare.norm2 is None
    dropouts = LongVQBlock(8, dropout=0.2, hidden_dropout=0.3, dropout_type="feature")
    assert [m.p for m in (dropouts.dropout, dropouts.ffn.dropout, dropouts.ffn.hidden_dropout)] == [0.2, 0.2, 0.3]
    assert {type(m).__name__ for m in (dropouts.dropout, dropouts.ffn.hidden_dropout)} == {"FeatureDropout"}
    names = {id(p): n for n, p in dense.named_parameters()}
    groups = {
        g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer_groups(dense, lr=1e-3, weight_decay=0.1)
    }
    assert "attention.window_bias" in groups["no_decay"]


@pytest.mark.parametrize("kind", ["element", "feature"])
def test_dropout_is_on_memory_candidate_and_feed_forward(kind):
    block = LongVQBlock(40, num_codes=4, d_state=4, d_ff=60, dropout=0.25, hidden_dropout=0.5, dropout_type=kind)
    outputs = {}
    block.dropout.register_forward_hook(lambda m, i, y: outputs.setdefault("block", []).append(y))
    block.ffn.dropout.register_forward_hook(lambda m, i, y: outputs.setdefault("out", []).append(y))
    block.ffn.hidden_dropout.register_forward_hook(lambda m, i, y: outputs.setdefault("hidden", []).append(y))
    block(torch.randn(3, 30, 40))
    assert len(outputs["block"]) == 2  # Z and U
    for where, probability in (("block", 0.25), ("out", 0.25), ("hidden", 0.5)):
        for y in outputs[where]:
            gone = y == 0
            assert abs(gone.double().mean() - probability) < 0.15, where
            assert bool((gone == gone[:, :1]).all()) == (kind == "feature")
    x = torch.randn(3, 30, 40)
    assert torch.equal(block.eval()(x), block(x))


@each_direction
@pytest.mark.parametrize("window_bias", [True, False])
@pytest.mark.parametrize("kind", ["mask", "packed", "both"])
def test_dense_attention_under_masks_and_documents(causal, window_bias, kind):
    attention = DenseAttention(
        4, 2, 3, value_dim=5, window=WINDOW, causal=causal, window_bias=window_bias, dtype=torch.float64
    )
    if window_bias:
        nn.init.normal_(attention.window_bias)
    rows = 3 if kind == "mask" else 1
    q, k, v = (torch.randn(rows, h, LENGTH, d, dtype=torch.float64) for h, d in ((4, 3), (2, 3), (2, 5)))
    mask = torch.rand(rows, LENGTH) < 0.3 if kind != "packed" else None
    if kind == "mask":
        mask[0, :6], mask[2] = True, True
    offsets = [0, LENGTH] if kind == "mask" else [0, 4, 4, 5, LENGTH]
    expected = torch.zeros(rows, 4, LENGTH, 5, dtype=torch.float64)
    bias = attention.window_bias if window_bias else torch.zeros(4, 2 * WINDOW, dtype=torch.float64)
    for row in range(rows):
        for start, end in itertools.pairwise(offsets):
            for i in range(start, end):
                keys = [j for j in range(start, i + 1 if causal else end) if mask is None or not mask[row, j]]
                if mask is not None and mask[row, i]:
                    continue
                for h in range(4):
                    column = [i - j if causal else j - i + WINDOW - 1 for j in keys]
                    near = [abs(i - j) < WINDOW for j in keys]
                    added = torch.stack([bias[h, c if n else 0] * n for n, c in zip(near, column, strict=True)])
                    weights = (k[row, h // 2, keys] @ q[row, h, i] * 3**-0.5 + added).softmax(0)
                    expected[row, h, i] = weights @ v[row, h // 2, keys]
    if mask is not None:  # masked inputs may be anything
        for x in (q, k, v):
            x[mask[:, None].expand(x.shape[:3])] = torch.nan
    cu_seqlens = None if kind == "mask" else torch.tensor(offsets, dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, mask, cu_seqlens=cu_seqlens)
    assert_close(out, expected, "out")
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (*leaves, *attention.parameters()))


def test_codes_approximate_dense_attention():
    core = CodebookAttention(2, 1, 4, num_codes=20, window=3, causal=True, dtype=torch.float64).eval()
    dense = DenseAttention(2, 1, 4, window=3, causal=True, dtype=torch.float64)
    nn.init.normal_(core.window_bias)
    dense.load_state_dict({"window_bias": core.window_bias})
    q, k, v = (torch.randn(1, h, 20, 4, dtype=torch.float64) for h in (2, 1, 1))
    core.codebook.embedding.copy_(k[0])
    assert_close(core(q, k, v), dense(q, k, v), "out")
    with pytest.raises(ValueError, match=r"k must have shape \(B, Hkv, L, D\) = \(1, 1, 20, 4\), got \(1, 2, 20, 4\)"):
        dense(q, q, v)
    with pytest.raises(TypeError, match="DenseAttention: v must have the dtype of q"):
        dense(q, k, v.float())
    with pytest.raises(TypeError, match=r"DenseAttention: q must be a torch.Tensor \(B, H, L, D\), got list"):
        dense([q], k, v)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(B, L\) = \(1, 20\), got \(1, 19\)"):
        dense(q, k, v, torch.zeros(1, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="DenseAttention: cu_seqlens must end with the length L = 20, got 3"):
        dense(q, k, v, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    assert repr(eval(repr(dense))) == repr(dense)


def test_a_block_without_codes_trains_and_has_no_commitment():
    block = LongVQBlock(8, num_codes=None, d_state=4)
    block(torch.randn(2, 9, 8)).square().mean().backward()
    assert commitment_loss(block) == 0
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ema", "post_scale", "batch"))]
)
def test_compiled_equals_eager(name):
    block = block_of(name, True).train()
    block(torch.randn(2, LENGTH, WIDTH, dtype=torch.float64))  # the k-means start of a codebook can't be compiled
    eager, x = copy.deepcopy(block), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    results = []
    for module, call in ((block, torch.compile(block, fullgraph=True, backend="aot_eager")), (eager, eager)):
        torch.manual_seed(3)
        y = call(x)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
    for first, second in zip(*results, strict=True):
        assert_close(first.double(), second.double(), "training")


def test_wrong_arguments_are_named():
    for options, text in (
        ({"ssm": "s5"}, "ssm must be one of 's4d', 'ema', got 's5'"),
        ({"norm_type": "group"}, "norm_type must be one of 'layer', 'rms', 'scale', 'batch', got 'group'"),
        ({"ffn_activation": "tanh"}, "ffn_activation must be one of 'silu', 'gelu', 'relu', got 'tanh'"),
        ({"dropout_type": "row"}, "dropout_type must be one of 'element', 'feature', got 'row'"),
        ({"activation": "relu"}, "activation must be one of 'softmax', 'laplace', got 'relu'"),
        (
            {"activation": "laplace", "num_codes": None},
            "activation must be 'softmax' with num_codes=None, got 'laplace'",
        ),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must be at least 0 and below 1, got 1\.0"),
        ({"d_ff": -1}, "d_ff must be at least 0, got -1"),
        ({"ema_dim": 0}, "ema_dim must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"LongVQBlock: {text}"):
            LongVQBlock(8, **options)
    for options, text in (
        ({"d_ff": 2.0}, "d_ff must be an int, got float"),
        ({"d_ff": False}, "d_ff must be an int, got bool"),
        ({"hidden_dropout": "a"}, "hidden_dropout must be a number, got 'a'"),
    ):
        with pytest.raises(TypeError, match=f"LongVQBlock: {text}"):
            LongVQBlock(8, **options)
    with pytest.raises(ValueError, match=r"num_codes must be at least 1, got 0"):
        LongVQBlock(8, num_codes=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_longvq_equals_the_definition(norm, causal):
    block = LongVQBlock(6, num_heads=2, num_codes=5, window=3, d_state=4, norm=norm, causal=causal).double()
    block(torch.randn(2, 30, 6, dtype=torch.float64))
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block.eval()
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    silu, heads = F.silu, lambda t: t.view(2, 20, 2, -1).transpose(1, 2)
    inner = block.norm1(x) if norm == "pre" else x
    z = silu(block.ssm(inner))
    q, k = z @ block.q_proj.weight.T + block.q_proj.bias, z @ block.k_proj.weight.T + block.k_proj.bias
    attention_gate = silu(z @ block.attention_gate.weight.T + block.attention_gate.bias)
    v = silu(inner @ block.v_proj.weight.T + block.v_proj.bias)
    out = ops.vq_attention(
        heads(q),
        heads(k),
        heads(v),
        block.codebook.embedding,
        causal=causal,
        window=3,
        bias=block.attention.window_bias,
        backend="reference",
    )
    out = out.transpose(1, 2).reshape(2, 20, 6)
    u = silu(
        inner @ block.candidate_x.weight.T
        + (attention_gate * out) @ block.candidate_o.weight.T
        + block.candidate_x.bias
    )
    gate = torch.sigmoid(z @ block.output_gate.weight.T + block.output_gate.bias)
    y = gate * u + (1 - gate) * x
    expected = (
        y + block.ffn(block.norm2(y)) if norm == "pre" else block.norm2(block.norm1(y) + block.ffn(block.norm1(y)))
    )
    assert_close(block(x), expected, "output")


def test_longvq_default_widths_fit_the_heads():
    block = LongVQBlock(10, num_heads=4)
    assert (block.d_attn, block.d_value, block.d_ff) == (8, 12, 20)
    assert block(torch.randn(1, 5, 10)).shape == (1, 5, 10)


def test_a_block_learns():
    # Copy the token 12 positions before, which is outside the window of 2.
    block = LongVQBlock(16, num_codes=16, window=2, d_state=16, causal=True)
    embed, head = nn.Embedding(6, 16), nn.Linear(16, 6)
    model = nn.ModuleList([embed, block, head])
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2, weight_decay=0.0, ssm_lr=1e-2))
    losses = []
    for _ in range(120):
        tokens = torch.randint(6, (8, 1, 12)).expand(-1, 2, -1).reshape(8, 24)
        loss = F.cross_entropy(head(block(embed(tokens)))[:, 12:].flatten(0, 1), tokens[:, 12:].roll(-1, 1).flatten())
        optimizer.zero_grad()
        (loss + commitment_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.6 and sum(losses[-10:]) / 10 < 1.4, losses[-10:]
