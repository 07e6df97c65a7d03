"""What every layer promises: shapes, causality, padding, copies, precision, compilation, gradients."""

import copy
import inspect
import io
import pickle

import pytest
import torch

import longvq_layers.layers as layers_module
from longvq_layers.layers import Codebook, commitment_loss
from tests.layers.cases import BARE, LAYERS, WIDTH, trained
from tests.tolerances import assert_close

each_layer = pytest.mark.parametrize("name", LAYERS)
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def codebooks(layer):
    return [module for module in layer.modules() if isinstance(module, Codebook)]


@each_layer
@each_direction
@pytest.mark.parametrize("shape", [(2, 9), (0, 5), (2, 0), (0, 0), (3, 1)])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_shapes(name, causal, shape, mode):
    layer = LAYERS[name](causal=causal).train(mode)
    y = layer(torch.randn(*shape, WIDTH))
    assert y.shape == (*shape, WIDTH)
    assert y.isfinite().all()
    y.sum().backward()


@each_layer
def test_causal_layers_see_the_past_and_not_the_future(name):
    layer = trained(name, causal=True, dtype=torch.float64)
    x = torch.randn(1, 14, WIDTH, dtype=torch.float64)
    onto = torch.randn(WIDTH, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: (layer(x) @ onto)[0], x)[:, 0].abs().sum(-1)  # (out, in)
    changed = x.clone()
    changed[:, 8] += torch.randn(WIDTH)
    difference = (layer(changed) - layer(x)).abs().sum((0, 2))
    assert (difference[:8] == 0).all()
    assert (difference[8:] > 0).all()  # far positions too, through codes or state
    if "vq" not in name:  # in a VQ layer all keys of a code share their gradient, see key_grad="cluster"
        assert (jacobian.triu(1) == 0).all()
    assert (jacobian.tril() > 0).sum() == 14 * 15 / 2


@each_layer
def test_bidirectional_layers_see_everything(name):
    layer = trained(name)
    x = torch.randn(1, 14, WIDTH)
    changed = x.clone()
    changed[:, 8] += torch.randn(WIDTH)
    assert ((layer(changed) - layer(x)).abs().sum((0, 2)) > 0).all()


@each_layer
@each_direction
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_change_nothing(name, causal, side):
    layer = trained(name, causal=causal, dtype=torch.float64)
    x = torch.randn(11, WIDTH, dtype=torch.float64)
    alone = layer(x.unsqueeze(0))[0]
    batch = torch.full((3, 17, WIDTH), 1e3, dtype=torch.float64)
    mask = torch.ones(3, 17, dtype=torch.bool)
    at = slice(6, 17) if side == "left" else slice(0, 11)
    batch[1, at], mask[1, at] = x, False
    batch[0, 2:5], mask[0, 2:5] = torch.randn(3, WIDTH, dtype=torch.float64), False  # the last row has only padding
    y = layer(batch, key_padding_mask=mask)
    assert_close(y[1, at], alone, "padded output")
    assert (y[mask] == 0).all()
    again = layer(batch.masked_fill(mask.unsqueeze(-1), -7), key_padding_mask=mask)
    assert torch.equal(y, again)


@each_layer
def test_masked_inputs_get_no_gradient_and_teach_nothing(name):
    results = []
    for filler in (0.0, 50.0):
        torch.manual_seed(1)
        layer = LAYERS[name]()
        x = torch.randn(2, 12, WIDTH)
        mask = torch.zeros(2, 12, dtype=torch.bool)
        mask[0, 7:] = mask[1, :3] = True
        x[mask] = filler
        x.requires_grad_()
        for _ in range(3):
            loss = layer(x, key_padding_mask=mask).square().sum() + commitment_loss(layer)
        loss.backward()
        assert (x.grad[mask] == 0).all()
        results.append([loss, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@each_layer
@each_direction
@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
def test_masked_inputs_may_be_anything(name, causal, filler):
    layer = trained(name, causal=causal)
    x = torch.randn(2, 12, WIDTH)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 7:] = mask[1, :3] = True
    results = []
    for value in (0.0, filler):
        layer.zero_grad()
        leaf = x.masked_fill(mask.unsqueeze(-1), value).requires_grad_()
        y = layer(leaf, key_padding_mask=mask)
        y[~mask].square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for first, second in zip(*results, strict=True):
        assert second.isfinite().all() and torch.equal(first, second)


@each_layer
@each_direction
def test_gradients_reach_every_parameter(name, causal):
    layer = LAYERS[name](causal=causal)
    (layer(torch.randn(2, 30, WIDTH)).square().mean() + commitment_loss(layer)).backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@each_layer
def test_state_dict_round_trip(name):
    layer, other = trained(name), LAYERS[name]()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(2, 20, WIDTH)
    assert torch.equal(other.eval()(x), layer(x))
    before = [book.embedding.clone() for book in codebooks(other)]
    other.train()(x)  # initialised: the codes keep learning, without a new k-means start
    for book, old in zip(codebooks(other), before, strict=True):
        assert (book.embedding - old).abs().max() < 0.5 * old.abs().max()


@each_layer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_after_a_training_step(name, how):
    layer = LAYERS[name]()
    x = torch.randn(2, 20, WIDTH)
    loss = layer(x).sum() + commitment_loss(layer)
    clone = how(layer)
    assert commitment_loss(clone) == 0
    loss.backward()
    assert torch.equal(clone.eval()(x), layer.eval()(x))
    clone.train()(x)
    for book, other in zip(codebooks(layer), codebooks(clone), strict=True):
        assert bool(other.initialized)
        assert book.steps == 1 and other.steps == 2  # the copy learns alone: nothing is shared


@each_layer
def test_meta_device(name):
    layer = trained(name)
    other = LAYERS[name](device="meta")
    assert {t.device.type for t in other.state_dict().values()} == {"meta"}
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, WIDTH)
    assert torch.equal(other.eval()(x), layer(x))


@each_layer
def test_half_precision_modules_keep_codebook_and_ssm_in_float32(name):
    layer = trained(name)
    x = torch.randn(2, 20, WIDTH)
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        y = half(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()
        assert torch.nn.functional.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > 0.98
        kept = [
            t
            for n, t in half.state_dict().items()
            if ("codebook" in n or "ssm." in n or "ema." in n) and t.is_floating_point()
        ]
        assert all(t.dtype == torch.float32 for t in kept)
        half.train()(x.to(dtype)).sum().backward()
    made = LAYERS[name](dtype=torch.bfloat16)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    back = copy.deepcopy(layer).bfloat16().float()
    for book, original in zip(codebooks(back), codebooks(layer), strict=True):
        assert torch.equal(book.embedding, original.embedding)


@each_layer
def test_autocast(name):
    layer = trained(name)
    x = torch.randn(2, 20, WIDTH)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer.train()
        loss = layer(x).float().square().mean() + commitment_loss(layer)
    loss.backward()
    assert torch.nn.functional.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > 0.98
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["vq", "s4d", "longvq"])  # compiling takes seconds
def test_compiled_equals_eager(name):
    layer = trained(name, causal=True)
    eager, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, WIDTH)
    assert_close(compiled(x), eager(x), "eval output")
    layer.train(), eager.train()
    results = []
    for module, call in ((layer, compiled), (eager, eager)):
        torch.manual_seed(3)
        y = call(x)
        (y.square().mean() + 100 * commitment_loss(module)).backward()
        results.append([y, *(p.grad for p in module.parameters()), *(b for b in module.buffers())])
    for first, second in zip(*results, strict=True):
        assert_close(first.float(), second.float(), "training")


@each_layer
def test_extra_repr_reproduces_the_call(name):
    layer = LAYERS[name](causal=True)
    text = f"{type(layer).__name__}({layer.extra_repr()})"
    again = eval(text, vars(layers_module))
    assert repr(again) == repr(layer)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


@each_layer
def test_modules_with_parameters_of_their_own_can_reset_them(name):
    layer = LAYERS[name](device="meta").to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    for module in layer.modules():
        if module._parameters or module._buffers:
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())


@each_layer
def test_eval_is_repeatable_and_changes_nothing(name):
    layer = trained(name)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 20, WIDTH)
    assert torch.equal(layer(x), layer(x))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["vq", "ssm", "ema", "s4d", "longvq", "mega", "local", "spade"])
@pytest.mark.parametrize("option", ["causal", "glu", "window_bias", "ssm_gate", "bias", "recompute", "global_ssm"])
def test_a_string_is_not_accepted_as_bool(name, option):
    made = type(LAYERS[name]())
    if option in inspect.signature(made).parameters:
        with pytest.raises(TypeError, match=rf"^\w+: {option} must be a bool, got 'false'$"):
            LAYERS[name](**{option: "false"})


@each_layer
def test_wrong_inputs_are_named(name):
    layer = LAYERS[name]()
    argument = "u" if name in BARE else "x"
    x = torch.randn(2, 6, WIDTH)
    with pytest.raises(ValueError, match=rf"{argument} must have 3 dimensions.*got 2"):
        layer(x[0])
    with pytest.raises(ValueError, match=rf"{argument} must have shape .*16\), got \(2, 6, 15\)"):
        layer(x[..., 1:])
    with pytest.raises(TypeError, match=rf"{argument} must be a real floating-point tensor, got torch.int64"):
        layer(x.long())
    with pytest.raises(TypeError, match=rf"{argument} must be a torch.Tensor .*got list"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(B, L\) = \(2, 6\), got \(2, 5\)"):
        layer(x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"key_padding_mask must be bool with True = ignore, got torch\.float32"):
        layer(x, key_padding_mask=torch.zeros(2, 6))
    if name not in BARE:  # those take any floating dtype
        with pytest.raises(TypeError, match=r"x must have the dtype of the layer, torch.float32, got torch.float64"):
            layer(x.double())
