"""register_adapter: attention modules of other people's classes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from longvq_layers.replace import custom, load_replaced, register_adapter, replace_attention, restore_attention
from tests.tolerances import assert_close


class OwnAttention(nn.Module):
    """Grouped queries, a scale of its own, and padding as lengths."""

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
    monkeypatch.setattr(custom, "_registered", {})
    register_adapter(OwnAttention, adapter, sizes=lambda module: (4, 2, 6))


X, LENGTHS = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 25])


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


def test_training_without_calibration_and_gradients():
    model = Model().train()
    replace_attention(model, num_codes=6, window=4)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.layers[0].longvq.codebook.initialized


def test_other_forwards_are_left_alone():
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_attention(Model(Overrides).eval(), calibration=[X])


def test_a_class_unknown_in_this_process_says_so(monkeypatch):
    model = Model().eval()
    replace_attention(model, num_codes=6, window=4, calibration=[X])
    data = pickle.dumps(model)
    monkeypatch.setattr(custom, "_registered", {})
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
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=f"register_adapter: {message}: got"):
        register_adapter(*arguments)
    with pytest.raises(TypeError, match="register_adapter: sizes: got int"):
        register_adapter(OwnAttention, adapter, sizes=3)
