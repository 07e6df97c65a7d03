"""torch.nn.MultiheadAttention, alone and inside torch's own Transformer layers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longvq_layers import commitment_loss
from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.adapters.torch_nn.attention import VQMultiheadAttention
from tests.replace.models import COARSE, FINE, encoder
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the original encoder warns


def causal_mask(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention as users call it, so that a calibration input is one tensor."""

    def __init__(self, width: int = 32, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, need_weights=False, **options)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", ["no", "bool", "float", "causal", "both"])
def test_one_code_per_key_is_the_original_module(batch_first, bias, masked):
    model = SelfAttention(bias=bias, batch_first=batch_first).eval()
    x = torch.randn(2, 31, 32)
    padding = torch.zeros(2, 31, dtype=torch.bool)
    padding[1, 20:] = True
    options = {}
    if masked in ("bool", "both"):
        options["key_padding_mask"] = padding
    if masked == "float":
        options["key_padding_mask"] = torch.zeros(2, 31).masked_fill(padding, -torch.inf)
    if masked in ("causal", "both"):
        options["attn_mask"] = causal_mask(31) == -torch.inf if masked == "both" else causal_mask(31)
    arranged = x if batch_first else x.transpose(0, 1)
    expected = model(arranged, **options)
    report = replace_attention(model, **FINE, calibration=[arranged])
    real = ~padding if batch_first else ~padding.T
    assert_close(model(arranged, **options)[real], expected[real], masked)
    assert report.layers[0].causal == "per call" and report.layers[0].output_error < 1e-4


def test_unbatched_input_and_other_value_width():
    model = SelfAttention().eval()
    x = torch.randn(31, 32)
    expected = model(x)
    replace_attention(model, **FINE, calibration=[x])
    assert_close(model(x), expected, "unbatched")
    assert_close(model(x, key_padding_mask=torch.zeros(31, dtype=torch.bool)), expected, "unbatched with padding mask")

    class OtherValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, vdim=20, batch_first=True)

        def forward(self, x, values):
            return self.attention(x, x, values, need_weights=False)[0]

    model, inputs = OtherValues().eval(), (torch.randn(2, 31, 32), torch.randn(2, 31, 20))
    expected = model(*inputs)
    replace_attention(model, **FINE, calibration=[inputs])
    assert_close(model(*inputs), expected, "vdim")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoder_is_never_bypassed(training, padded):
    model = encoder()
    x = torch.randn(2, 31, 32)
    padding = torch.zeros(2, 31, dtype=torch.bool)
    padding[1, 20:] = True
    mask = {"src_key_padding_mask": padding} if padded else {}
    with torch.no_grad():  # without gradients torch uses its fast path and nested tensors
        original = model(x, **mask)
        dense = copy.deepcopy(model)
        replace_attention(model, **COARSE, calibration=[x])
        replace_attention(dense, **COARSE, calibration=[x], backend="reference")
        for module in (*model.modules(), *dense.modules()):
            if type(module).__name__ == "Codebook":
                module.freeze()
        model.train(training)
        dense.train(training)
        swapped, expected = model(x, **mask), dense(x, **mask)
    assert (swapped - original)[~padding].abs().max() > 1e-3  # the fast path would give the original output
    assert_close(swapped, expected, "encoder")


def test_an_encoder_reproduces_the_original_and_ignores_padding():
    model = encoder()
    x = torch.randn(2, 31, 32)
    padding = torch.zeros(2, 31, dtype=torch.bool)
    padding[1, 20:] = True
    expected = model(x, src_key_padding_mask=padding)
    replace_attention(model, **FINE, calibration=[(x, None, padding)])
    before = model(x, src_key_padding_mask=padding)
    assert_close(before[~padding], expected[~padding], "encoder")
    x[padding] = 7.0
    assert torch.equal(model(x, src_key_padding_mask=padding)[~padding], before[~padding])


def test_causality_is_per_call():
    model = encoder()
    x = torch.randn(2, 31, 32)
    replace_attention(model, **COARSE, calibration=[x])
    by_mask = model(x, mask=causal_mask(31))
    assert_close(model(x, mask=causal_mask(31), is_causal=True), by_mask, "mask and hint")
    assert_close(model(x, is_causal=True), by_mask, "hint alone, no L x L mask")
    assert (model(x) - by_mask).abs().max() > 1e-3
    changed = x.clone()
    changed[:, 20:] = 3.0
    assert torch.equal(model(changed, is_causal=True)[:, :20], model(x, is_causal=True)[:, :20])


def test_a_mask_that_hides_nothing_is_none():
    layer, x = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval(), torch.randn(2, 31, 32)
    replace_attention(layer, **COARSE, calibration=[x])
    for nothing in (torch.zeros(31, 31), torch.zeros(31, 31, dtype=torch.bool)):
        assert torch.equal(layer(x, src_mask=nothing), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_module_itself(reentrant):
    model, x, found = SelfAttention(batch_first=True), torch.randn(2, 31, 32), []
    replace_attention(model, **COARSE, calibration=[x])
    module = model.eval().attention
    for wrap in (lambda *args: module(*args, need_weights=False)[0], None):
        y = x.clone().requires_grad_()
        if wrap is None:
            out = checkpoint(lambda *args: module(*args, need_weights=False)[0], y, y, y, use_reentrant=reentrant)
        else:
            out = wrap(y, y, y)
        out.square().sum().backward()
        found.append((out.detach(), y.grad))
    assert_close(found[1][0], found[0][0], "output")
    assert_close(found[1][1], found[0][1], "gradient")


def test_masks_of_one_position_and_hints():
    module, x = SelfAttention(batch_first=True).eval(), torch.randn(2, 31, 32)
    replace_attention(module, **COARSE, calibration=[x])
    assert torch.equal(module(x[:, :1], attn_mask=causal_mask(1)), module(x[:, :1]))
    assert torch.equal(module(x, attn_mask=torch.zeros(31, 31), is_causal=True), module(x, is_causal=True))


@pytest.mark.parametrize("detached", ["none", "value", "key and value"])
def test_gradients_go_where_each_argument_comes_from(detached):
    module, x, found = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 31, 32), []
    for swapped in (False, True):
        if swapped:
            module.train()
            replace_attention(module, num_codes=8, window=31)  # the window sees every key
        y = x.clone().requires_grad_()
        z = 2 * y
        key = z.detach() if detached == "key and value" else z
        value = z if detached == "none" else z.detach()
        module(z, key, value, need_weights=False)[0].square().sum().backward()
        found.append(y.grad)
    assert_close(found[1], found[0], detached)


def test_vmap_over_values():
    module, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(3, 31, 32)
    replace_attention(module.train(), **COARSE)
    module(x, x, x, need_weights=False)
    module.eval()
    values = torch.randn(3, 31, 32)
    mapped = torch.func.vmap(lambda x, v: module(x, x, v, need_weights=False)[0])(x, values)
    assert_close(mapped, module(x, x, values, need_weights=False)[0], "vmap")


def test_decoder_layers_keep_their_cross_attention():
    model = nn.TransformerDecoderLayer(32, 4, dim_feedforward=48, batch_first=True).eval()
    target, memory = torch.randn(2, 20, 32), torch.randn(2, 9, 32)
    mask = causal_mask(20)
    expected = model(target, memory, tgt_mask=mask)
    with pytest.raises(NotImplementedError, match="multihead_attn: cross-attention"):
        replace_attention(model, **FINE, calibration=[(target, memory, mask)])
    report = replace_attention(model, **FINE, calibration=[(target, memory, mask)], strict=False)
    assert [layer.name for layer in report.replaced] == ["self_attn"]
    assert [layer.name for layer in report.skipped] == ["multihead_attn"]
    assert_close(model(target, memory, tgt_mask=mask, tgt_is_causal=True), expected, "decoder layer")


def test_training_learns_and_differentiates():
    model = encoder().train()
    x = torch.randn(2, 31, 32)
    replace_attention(model, **COARSE)
    (model(x).square().mean() + commitment_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert model(x).isfinite().all()


def test_names_hooks_and_objects_survive():
    model = encoder()
    x = torch.randn(2, 31, 32)
    names = list(model.state_dict())
    calls = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    parameters = {id(p) for p in model.parameters()}
    modules = [(id(module), type(module)) for module in model.modules()]
    expected = model(x)
    calls.clear()
    replace_attention(model, **COARSE, calibration=[x])
    assert type(model.layers[0].self_attn) is VQMultiheadAttention
    assert [name for name in model.state_dict() if "longvq" not in name] == names
    calls.clear()
    model(x)
    assert calls == [1]
    restore_attention(model)
    assert [(id(module), type(module)) for module in model.modules()] == modules
    assert {id(p) for p in model.parameters()} == parameters and list(model.state_dict()) == names
    assert model.use_nested_tensor is True and model.layers[0].self_attn._qkv_same_embed_dim is True
    assert torch.equal(model(x), expected)


def test_compiles_into_one_graph_with_equal_values():
    model = SelfAttention(batch_first=True).eval()
    x = torch.randn(2, 31, 32)
    replace_attention(model, **COARSE, calibration=[x])
    padding = torch.zeros(2, 31, dtype=torch.bool)
    padding[1, 20:] = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, key_padding_mask=padding), model(x, key_padding_mask=padding), "compiled")
    torch._dynamo.reset()


def test_a_compiled_float_mask_is_checked_when_it_runs():
    model = SelfAttention(batch_first=True).eval()
    x = torch.randn(2, 31, 32)
    replace_attention(model, **COARSE, calibration=[x])
    padding = torch.zeros(2, 31)
    padding[1, 20:] = -torch.inf
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, key_padding_mask=padding), model(x, key_padding_mask=padding), "compiled")
    with pytest.raises(NotImplementedError, match="key_padding_mask must hold 0 and -inf only, got other values"):
        compiled(x, key_padding_mask=torch.where(padding == 0, 0.5, padding))
    torch._dynamo.reset()


def test_what_a_call_refuses():
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 31, 32)
    replace_attention(model.train(), **COARSE)
    cases = [
        (NotImplementedError, "pass need_weights=False", (x, x, x), {"need_weights": True}),
        (NotImplementedError, "key must be query itself, got another tensor", (x, x.clone(), x), {}),
        (NotImplementedError, "not exactly causal", (x, x, x), {"attn_mask": causal_mask(31).roll(1, 1)}),
        (
            NotImplementedError,
            "attn_mask must hold 0 and -inf only, got other values",
            (x, x, x),
            {"attn_mask": torch.randn(31, 31)},
        ),
        (
            ValueError,
            r"attn_mask must have shape \(31, 31\), got \(30, 30\)",
            (x, x, x),
            {"attn_mask": causal_mask(30)},
        ),
        (
            NotImplementedError,
            "key_padding_mask must hold 0 and -inf only, got other values",
            (x, x, x),
            {"key_padding_mask": torch.randn(2, 31)},
        ),
        (
            ValueError,
            r"key_padding_mask must have shape \(2, 31\), got \(3, 31\)",
            (x, x, x),
            {"key_padding_mask": torch.zeros(3, 31)},
        ),
        (
            TypeError,
            "key_padding_mask must be bool or float, got torch.int64",
            (x, x, x),
            {"key_padding_mask": torch.zeros(2, 31).long()},
        ),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            model(*args, **{"need_weights": False, **options})
    y = x[..., :30]
    with pytest.raises(ValueError, match=r"query must have shape .*, got \(2, 31, 30\)"):
        model(y, y, y, need_weights=False)
    nested = torch.nested.nested_tensor([x[0], x[1, :20]])
    with pytest.raises(NotImplementedError, match="nested tensor"):
        model(nested, nested, nested, need_weights=False)


def test_what_only_a_call_shows_is_named_or_skipped():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.pool = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.pool(x[:, :1], x, x)[0]

    model, x = Pooled().eval(), torch.randn(2, 31, 32)
    expected = model(x)
    with pytest.raises(
        NotImplementedError, match=r"filter_fn= or pass strict=False(.|\n)*pool: in calibration, .*need_we"
    ):
        replace_attention(model, **FINE, calibration=[x])
    assert torch.equal(model(x), expected)
    report = replace_attention(model, **FINE, calibration=[x], strict=False)
    assert [layer.name for layer in report.skipped] == ["pool"] and "need_weights" in report.skipped[0].skipped
    assert_close(model(x), expected, "pooled")
    with pytest.raises(
        ValueError, match=r"nothing to replace in Pooled:\n  attention: filter_fn .*\n  pool: in calibr"
    ):
        replace_attention(
            Pooled().eval(), **FINE, calibration=[x], strict=False, filter_fn=lambda module, name: name == "pool"
        )


def test_what_a_replacement_refuses():
    for options, reason in (
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
        ({"kdim": 20}, "kdim 20 differs from embed_dim 32"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            replace_attention(nn.MultiheadAttention(32, 4, **options), num_codes=8)

    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(NotImplementedError, match="Own is a subclass"):
        replace_attention(nn.Sequential(Own(32, 4)), num_codes=8)
