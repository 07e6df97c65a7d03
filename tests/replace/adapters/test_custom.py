"""register_adapter: attention modules of the user's own classes."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from longvq_layers.replace import (
    distill_attention,
    load_replaced,
    register_adapter,
    replace_attention,
    restore_attention,
)
from longvq_layers.replace.adapters.custom import registry
from tests.tolerances import assert_close

X, LENGTHS = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 25])


class OwnAttention(nn.Module):
    """Attention with grouped queries, its own scale, and padding given as lengths."""

    def __init__(self, causal=True):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.causal = causal

    def project(self, x):
        q = self.q(x).unflatten(-1, (4, 6)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 6)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x, lengths=None):
        q, k, v = self.project(x)
        mask = None
        if lengths is not None or self.causal:
            length = x.shape[1]
            mask = (
                torch.ones(1, 1, length, length, dtype=torch.bool).tril() if self.causal else torch.ones(1, 1, 1, 1) > 0
            )
            if lengths is not None:
                mask = mask & (torch.arange(length) < lengths[:, None])[:, None, None]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Inherits(OwnAttention):
    pass


class Overrides(OwnAttention):
    def forward(self, x, lengths=None):
        return super().forward(x, lengths) + 1


def adapter(module, attend, x, lengths=None):
    q, k, v = module.project(x)
    padding = None if lengths is None else torch.arange(x.shape[1]) >= lengths[:, None]
    out = attend(q, k, v, causal=module.causal, key_padding_mask=padding, scale=0.3)
    return module.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kind=OwnAttention, **options):
        super().__init__()
        self.layers = nn.ModuleList(kind(**options) for _ in range(2))

    def forward(self, x, lengths=None):
        for layer in self.layers:
            x = x + layer(x, lengths)
        return x


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    register_adapter(OwnAttention, adapter, sizes=lambda module: (4, 2, 6))


@pytest.mark.parametrize("kind", [OwnAttention, Inherits])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_with_a_code_per_key_and_to_the_definition(kind, causal):
    model = Model(kind, causal=causal).eval()
    expected, modules = model(X, LENGTHS), list(model.layers)
    real = torch.arange(40) < LENGTHS[:, None]
    report = replace_attention(model, num_codes=96, window=8, calibration=[(X, LENGTHS)])
    assert_close(model(X, LENGTHS)[real], expected[real], "one code per key")
    assert [layer.kind for layer in report.replaced] == [kind.__name__] * 2 and isinstance(model.layers[0], kind)
    report.restore()
    assert torch.equal(model(X, LENGTHS), expected) and [type(m) for m in model.layers] == [kind] * 2
    assert list(model.layers) == modules
    dense = copy.deepcopy(model)
    for one, backend in ((model, "torch"), (dense, "reference")):
        replace_attention(one, num_codes=6, window=4, calibration=[(X, LENGTHS)], backend=backend)
    assert_close(model(X, LENGTHS)[real], dense(X, LENGTHS)[real], "definition")
    assert not torch.allclose(model(X, LENGTHS)[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("kind", [OwnAttention, Inherits])
def test_copies_pickles_and_saved_states(kind):
    model = Model(kind).eval()
    replace_attention(model, num_codes=6, window=4, calibration=[X])
    expected = model(X)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), expected) and isinstance(copied.layers[0], kind)
        restore_attention(copied)
        assert type(copied.layers[0]) is kind
    fresh = Model(kind).eval()
    load_replaced(fresh, model.state_dict())
    assert torch.equal(fresh(X), expected)


class ByLength(OwnAttention):
    """The length comes first, as in older modules, and the output is the first of two values."""

    def forward(self, x, lengths=None):
        return super().forward(x, lengths).transpose(0, 1), None


def by_length(module, attend, x, lengths=None):
    return adapter(module, attend, x, lengths).transpose(0, 1), None


def wrongly(change):
    """The adapter with some arguments of `attend` changed by `change`."""

    def wrong(module, attend, x, lengths=None):
        padding = None if lengths is None else torch.arange(x.shape[1]) >= lengths[:, None]
        call = dict(zip("qkv", module.project(x), strict=True))
        call |= {"causal": module.causal, "key_padding_mask": padding, "scale": 0.3}
        call |= change(call)
        return module.out(attend(**call).transpose(1, 2).flatten(2))

    return wrong


WRONG = {
    "causal": lambda call: {"causal": not call["causal"]},
    "scale": lambda call: {"scale": None},
    "exchanged": lambda call: {"k": call["v"], "v": call["k"]},
    "heads": lambda call: {"q": call["q"].roll(1, 1)},
    "padding": lambda call: {"key_padding_mask": None},
}


@pytest.mark.parametrize(
    ("causal", "wrong"),  # in causal attention no token sees the padding after it
    [(causal, wrong) for causal in (False, True) for wrong in WRONG if not (causal and wrong == "padding")],
)
def test_an_adapter_that_does_something_else_raises(causal, wrong):
    model, change = Model(causal=causal).eval(), WRONG[wrong]
    expected = model(X, LENGTHS)
    register_adapter(OwnAttention, wrongly(change))
    with pytest.raises(
        ValueError, match=r"adapter of OwnAttention: must return the module's own output .*, got an output that differs"
    ):
        replace_attention(model, num_codes=6, window=4, calibration=[(X, LENGTHS)])
    assert torch.equal(model(X, LENGTHS), expected) and not hasattr(model.layers[0], "longvq")
    register_adapter(OwnAttention, wrongly(change), check=False)
    replace_attention(model, num_codes=6, window=4, calibration=[(X, LENGTHS)])


def test_outputs_of_every_layout_are_compared():
    register_adapter(ByLength, by_length)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module, x = ByLength().eval().to(dtype), X.to(dtype)
        replace_attention(module, num_codes=6, window=4, calibration=[(x, LENGTHS), (x,)]).restore()
        with torch.autocast("cpu", torch.bfloat16):
            replace_attention(module, num_codes=6, window=4, calibration=[(x, LENGTHS), (x,)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda *call: (adapter(*call), None),
            r"must return shape \(40, 2, 24\) as the module itself does, got \(2, 40, 24\)",
        ),
        (lambda *call: [adapter(*call)][1:], "must return a tensor as the module itself does, got no tensor"),
        (
            lambda *call: adapter(*call).transpose(0, 1) * 1.1,
            "must return the module's own output .* differs by 0.11 of what",
        ),
    ],
)
def test_outputs_that_differ(wrong, message):
    register_adapter(ByLength, wrong)
    with pytest.raises(ValueError, match=f"adapter of ByLength: {message}"):
        replace_attention(ByLength().eval(), num_codes=6, window=4, calibration=[(X, LENGTHS)])


class Block(OwnAttention):
    """A block with a norm before its attention and a residual, so that most of its output isn't attention."""

    def forward(self, x, lengths=None):
        return x + super().forward(nn.functional.layer_norm(x, x.shape[-1:]), lengths)


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_residual_hides_nothing(size, wrong):
    def block(module, attend, x, lengths=None):
        q, k, v = module.project(nn.functional.layer_norm(x, x.shape[-1:]))
        return x + module.out(attend(q, k, v, causal=not wrong, scale=0.3).transpose(1, 2).flatten(2))

    register_adapter(Block, block)
    with pytest.raises(ValueError, match="an output that differs by") if wrong else contextlib.nullcontext():
        replace_attention(Block().eval(), num_codes=6, window=4, calibration=[size * X])


def test_precision_set_in_the_newer_way_is_accepted(monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    replace_attention(Model().eval(), num_codes=6, window=4, calibration=[X])


class Three(OwnAttention):
    """Attention that needs queries, keys and values to be one tensor."""

    def forward(self, q, k, v):
        assert q is k and k is v
        return super().forward(q)


def test_one_tensor_given_three_times_stays_one():
    model = nn.Module()
    model.attention = Three().eval()
    model.forward = lambda x: model.attention(x, x, x)
    register_adapter(
        Three,
        lambda module, attend, q, k, v: module.out(
            attend(*module.project(q), causal=q is k and k is v, scale=0.3).transpose(1, 2).flatten(2)
        ),
    )
    replace_attention(model, num_codes=6, window=4, calibration=[X])


class Odd(OwnAttention):
    """Attention that changes its input or returns its output in an unusual way."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x, lengths=None):
        if self.way == "in place":
            x.add_(1)
        out = super().forward(x, lengths)
        if self.way == "random":
            out = out + torch.randn_like(out)
        return {"flat": out.flatten(0, 1), "second": (None, out), "first axis": out.transpose(0, 1)}.get(self.way, out)


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("way", ["flat", "second", "first axis", "in place", "random", "rows"])
def test_odd_modules_with_right_and_wrong_adapters(way, factor):
    def odd(module, attend, x, lengths=None):
        if way == "in place":
            x.add_(1)
        if way == "rows":
            out = torch.cat([adapter(module, attend, x[i : i + 1], lengths[i : i + 1]) for i in range(len(x))])
        else:
            out = adapter(module, attend, x, lengths)
        out = factor * out + (torch.randn_like(out) if way == "random" else 0)
        return {"flat": out.flatten(0, 1), "second": (None, out), "first axis": out.transpose(0, 1)}.get(way, out)

    register_adapter(Odd, odd)
    x, lengths = torch.randn(16, 16, 24), torch.arange(1, 17)  # as many sequences as positions
    differs = pytest.raises(ValueError, match=r"got an output that differs by 0\.09")
    with differs if factor > 1 and way != "random" else contextlib.nullcontext():
        replace_attention(Odd(way).eval(), num_codes=6, window=4, calibration=[(x, lengths)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda call: {"q": None}, TypeError, r"q must be a torch.Tensor \(B, H, L, D\), got NoneType"),
        (lambda call: {"q": call["q"].flatten(1, 2)}, ValueError, "q must have 4 dimensions"),
        (lambda call: {"k": call["k"].int()}, TypeError, "k must be a real floating-point tensor, got torch.int32"),
        (lambda call: {"k": call["k"][:1]}, ValueError, "k must have shape"),
        (lambda call: {"k": call["k"][..., :5]}, ValueError, "k must have shape"),
        (lambda call: {"v": call["v"][:, :1]}, ValueError, "v must have shape"),
        (lambda call: {"v": call["v"][:, :, 1:]}, ValueError, "v must have shape"),
        (lambda call: {"q": call["q"][:, :3]}, ValueError, "the heads H of q must be a multiple"),
        (
            lambda call: {"q": call["q"][:, :, :7]},
            NotImplementedError,
            "must have one key per query, got 7 queries for 40 keys",
        ),
        (lambda call: {"causal": None}, TypeError, "causal must be a bool, got None"),
        (lambda call: {"key_padding_mask": torch.zeros(2, 40)}, TypeError, "key_padding_mask must be bool"),
        (lambda call: {"key_padding_mask": torch.zeros(2, 39) > 0}, ValueError, "key_padding_mask must have shape"),
        (lambda call: {"scale": "0.3"}, TypeError, "scale must be a number, got '0.3'"),
    ],
)
def test_what_an_adapter_passes_is_checked(change, error, message):
    model = Model().eval()
    replace_attention(model, num_codes=6, window=4, calibration=[X])
    register_adapter(OwnAttention, wrongly(change))
    message = f"adapter of OwnAttention: {message}" if error is not NotImplementedError else message
    with pytest.raises(error, match=r"\(H, Hkv, D\) = \(4, 2, 6\)" if "multiple" in message else message):
        model(X)
    restore_attention(model)
    with pytest.raises(error, match=message):
        replace_attention(model, num_codes=6, window=4, calibration=[X])


@pytest.mark.parametrize("sizes", [None, (4, 2), (4, 2, 6.0), (4, 0, 6)])
def test_sizes_of_the_wrong_form_are_refused(sizes):
    register_adapter(OwnAttention, adapter, sizes=lambda module: sizes)
    with pytest.raises(
        ValueError, match=r"register_adapter: sizes must return \(H, Hkv, D\), .* got .* for a OwnAttention"
    ):
        replace_attention(Model().train(), num_codes=6, window=4)


def test_training_without_calibration_and_gradients():
    model = Model().train()
    replace_attention(model, num_codes=6, window=4)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.layers[0].longvq.codebook.initialized


def test_registered_classes_are_distilled():
    model = Model().eval()
    replace_attention(model, num_codes=6, window=4, calibration=[X])
    report = distill_attention(model, [X, X], steps=6, evaluate_every=2, projections=True)
    assert all(report.after[name] < error for name, error in report.before.items())


def test_other_forwards_are_left_alone():
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_attention(Model(Overrides).eval(), calibration=[X])


def test_a_class_unknown_in_this_process_says_so(monkeypatch):
    model = Model().eval()
    replace_attention(model, num_codes=6, window=4, calibration=[X])
    data = pickle.dumps(model)
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(RuntimeError, match="OwnAttention has no adapter in this process"):
        pickle.loads(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OwnAttention(), adapter), "cls"),
        ((int, adapter), "cls"),
        ((OwnAttention, None), "adapter"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments, message):
    with pytest.raises(TypeError, match=f"register_adapter: {message} must be .*, got"):
        register_adapter(*arguments)
    with pytest.raises(TypeError, match="register_adapter: sizes must be a callable or None, got int"):
        register_adapter(OwnAttention, adapter, sizes=3)
    with pytest.raises(TypeError, match="register_adapter: check must be a bool, got 1"):
        register_adapter(OwnAttention, adapter, check=1)


@pytest.mark.parametrize("model", [Model, lambda: nn.Sequential(nn.MultiheadAttention(24, 4))])
def test_a_forward_of_the_object_itself_would_bypass_the_codes(model):
    model = model().eval()
    module = next(module for module in model.modules() if isinstance(module, OwnAttention | nn.MultiheadAttention))
    module.forward = module.forward  # as accelerate's hooks do
    with pytest.raises(NotImplementedError, match="its forward was replaced on the module itself"):
        replace_attention(model, calibration=[X])
