"""SPADEBlock against a plain rewrite of its equations, its decoder form, and errors."""

import copy

import pytest
import torch

from longvq_layers.layers import DiagonalSSM, SPADEBlock, optimizer_groups
from tests.tolerances import assert_close


def make(**options):
    options = {"window": 3, "d_state": 4, "causal": True, "dtype": torch.float64, **options}
    block = SPADEBlock(8, 2, **options).eval()
    with torch.no_grad():
        for p in block.parameters():  # biases, gains and the logit too, so that none has its initial 0, 1 or ½
            p.add_(torch.randn_like(p) * 0.1)
    return block


def plain(block, x, memory=None):
    """The equations for a batch without padding, from the weights alone, except for the SSM."""
    p, functional = dict(block.named_parameters()), torch.nn.functional

    def norm(name, y):
        return functional.layer_norm(y, (8,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(name, y):
        return y @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(name, y, source, window=None):
        q, k, v = (
            linear(f"{name}.{part}_proj", z).unflatten(-1, (2, 4)).transpose(1, 2)
            for part, z in (("q", y), ("k", source), ("v", source))
        )
        scores = q @ k.transpose(-1, -2) / 2
        if window:
            offset = torch.arange(y.shape[1])[:, None] - torch.arange(y.shape[1])
            bias, causal = p[f"{name}.window_bias"], block.causal
            near = (offset >= 0) & (offset < window) if causal else offset.abs() < window
            index = offset if causal else window - 1 - offset
            scores = (scores + bias[:, index.clamp(0, bias.shape[1] - 1)]).masked_fill(~near, -torch.inf)
        return linear(f"{name}.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def mix(y):
        if block.ssm is None:
            return attention("local", y, y, 3)
        if block.combine == "stack":
            z = block.ssm(y)
            return attention("local", z, z, 3)
        parts = norm("norm_global", block.ssm(y)), norm("norm_local", attention("local", y, y, 3))
        if block.combine == "concat":
            return linear("combine_proj", torch.cat(parts, -1))
        w = 1 / (1 + torch.exp(-p["combine_logit"]))
        return w * parts[0] + (1 - w) * parts[1]

    def ffn(y):
        return linear("ffn.down", functional.gelu(linear("ffn.up", y)))

    if block.norm == "pre":
        y = x + mix(norm("norm1", x))
        if memory is not None:
            y = y + attention("cross", norm("norm3", y), memory)
        return y + ffn(norm("norm2", y))
    y = norm("norm1", x + mix(x))
    if memory is not None:
        y = norm("norm3", y + attention("cross", y, memory))
    return norm("norm2", y + ffn(y))


FORMS = ({"combine": "concat"}, {"combine": "add"}, {"combine": "stack"}, {"global_ssm": False})


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decoder", [False, True])
def test_equals_its_equations(form, norm, causal, decoder):
    block = make(**form, norm=norm, causal=causal, cross_attention=decoder)
    x, memory = torch.randn(2, 37, 8).double(), torch.randn(2, 5, 8).double() if decoder else None
    assert_close(block(x, memory=memory), plain(block, x, memory), "y")


def test_only_parts_that_are_asked_for_exist():
    names = {name.split(".")[0] for name, _ in make(global_ssm=False).named_parameters()}
    assert names == {"norm1", "norm2", "local", "ffn"}
    assert not any(isinstance(m, DiagonalSSM) for m in make(global_ssm=False).modules())
    assert "combine_logit" not in dict(make().named_parameters())
    assert SPADEBlock(8, 2, combine="add").combine_logit.sigmoid() == 0.5


def test_an_upper_block_sees_its_window_only():
    x = torch.randn(1, 30, 8).double()
    changed = x.clone()
    changed[:, 10] += torch.randn(8)  # different in each channel: a layer norm removes an equal change
    for form, last in (({"global_ssm": False}, 12), ({}, 29)):
        block = make(**form)
        seen = (block(changed) - block(x)).abs().sum((0, 2)).nonzero().flatten().tolist()
        assert seen == list(range(10, last + 1))


def test_padding_of_both_sequences_changes_nothing():
    block = make(cross_attention=True, causal=False)
    x, memory = torch.randn(1, 9, 8).double(), torch.randn(1, 6, 8).double()
    wide, far = torch.full((2, 14, 8), torch.nan).double(), torch.full((2, 10, 8), torch.nan).double()
    mask, hidden = torch.ones(2, 14, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)
    wide[1, 5:], mask[1, 5:], far[1, 1:7], hidden[1, 1:7] = x[0], False, memory[0], False
    y = block(wide, mask, memory=far, memory_key_padding_mask=hidden)
    assert_close(y[1, 5:], block(x, memory=memory)[0], "y")
    assert (y[mask] == 0).all()


def test_packed_documents_have_their_own_memory():
    block = make(cross_attention=True)
    x, memory = torch.randn(1, 12, 8).double(), torch.randn(3, 6, 8).double()
    y = block(x, memory=memory, cu_seqlens=torch.tensor([0, 5, 6, 12], dtype=torch.int32))
    for n, at in enumerate((slice(0, 5), slice(5, 6), slice(6, 12))):
        assert_close(y[:, at], block(x[:, at], memory=memory[n : n + 1]), f"document {n}")


def test_gradients_reach_every_parameter_of_a_decoder():
    block = make(cross_attention=True).train()
    memory = torch.randn(2, 6, 8).double().requires_grad_()
    block(torch.randn(2, 40, 8).double(), memory=memory).square().mean().backward()
    assert memory.grad.abs().sum() > 0
    for name, p in block.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_missing_or_unexpected_memory_is_named():
    x, mask = torch.randn(1, 4, 8).double(), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="SPADEBlock: memory must be given"):
        make(cross_attention=True)(x)
    with pytest.raises(ValueError, match="SPADEBlock: memory must be None in a block without cross-attention"):
        make()(x, memory=x)
    with pytest.raises(ValueError, match="memory_key_padding_mask must be None"):
        make()(x, memory_key_padding_mask=mask)
    with pytest.raises(ValueError, match=r"memory must have shape"):
        make(cross_attention=True)(x, memory=torch.randn(2, 3, 8).double())


def test_each_dropout_is_in_its_place():
    block = SPADEBlock(8, 2, dropout=0.5, hidden_dropout=0.0, dropout_type="feature", cross_attention=True)
    x, memory = torch.randn(2, 20, 8), torch.randn(2, 5, 8)
    torch.nn.init.zeros_(block.ffn.down.weight), torch.nn.init.zeros_(block.ffn.down.bias)
    torch.nn.init.zeros_(block.cross.out_proj.weight), torch.nn.init.zeros_(block.cross.out_proj.bias)
    dropped = block(x, memory=memory) - x == 0  # of the mixer
    assert dropped.any() and not dropped.all() and (dropped == dropped[:, :1]).all()
    assert torch.equal(block.eval()(x, memory=memory), copy.deepcopy(block)(x, memory=memory))
    assert (block.dropout.p, block.ffn.dropout.p, block.ffn.hidden_dropout.p) == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("norm_type", ["layer", "rms", "scale", "batch"])
def test_norm_type_reaches_every_norm(norm_type):
    block = SPADEBlock(8, 2, norm_type=norm_type, cross_attention=True)
    kinds = [type(m).__name__.lower() for name, m in block.named_modules() if name.startswith("norm")]
    assert len(kinds) == 5 and all(kind.startswith(norm_type) for kind in kinds)
    assert block(torch.randn(2, 9, 8), memory=torch.randn(2, 4, 8)).isfinite().all()


def test_optimizer_groups():
    block = make(combine="add")
    groups = {
        group["name"]: {id(p) for p in group["params"]} for group in optimizer_groups(block, lr=1, weight_decay=1)
    }
    assert id(block.ssm.log_dt) in groups["ssm"]
    assert {id(block.combine_logit), id(block.local.window_bias)} <= groups["no_decay"]


def test_wrong_options_are_named():
    for wrong in (
        {"combine": "sum"},
        {"norm": "none"},
        {"norm_type": "group"},
        {"dropout_type": "row"},
        {"d_state": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SPADEBlock(8, 2, **wrong)
    for wrong in ({"window": 0}, {"d_ff": 0}, {"dropout": 1.0}, {"ffn_activation": "tanh"}, {"backend": "fast"}):
        name = next(iter(wrong)).removeprefix("ffn_")
        with pytest.raises(ValueError, match=name):
            SPADEBlock(8, 2, **wrong)
    with pytest.raises(ValueError, match="d_model must be a multiple of num_heads"):
        SPADEBlock(8, 3)


def test_compiled_equals_eager():
    block = make(causal=False, dtype=torch.float32)
    x, mask = torch.randn(2, 40, 8), torch.rand(2, 40) < 0.2
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, mask), block(x, mask), "y")
