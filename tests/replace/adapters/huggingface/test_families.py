"""Model families in use, each with its real class: equal to the original, equal to the definition, and restored."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from longvq_layers import commitment_loss
from longvq_layers.replace import replace_attention
from tests.replace.adapters.huggingface.families import (
    DECODERS,
    FAMILIES,
    LENGTH,
    ROTARY,
    Family,
    bart,
    bart_inputs,
    t5,
)
from tests.replace.models import COARSE, output, tokens
from tests.tolerances import assert_close

ALL_KEYS = 2 * LENGTH + 22  # one code per key of both rows
WIDE = LENGTH + 40  # no pair is outside the window
FINE = {"many codes": {"num_codes": ALL_KEYS, "window": 5}, "wide window": {"num_codes": 4, "window": WIDE}}
# Rotary models run once with each kind of far positions.
POSITIONS = {name: ("rectified", "rotated") if name in ROTARY else ("auto",) for name in FAMILIES}
BOTH = [(name, positions) for name in FAMILIES for positions in POSITIONS[name]]
both = pytest.mark.parametrize(("name", "positions"), BOTH, ids=[f"{name}-{positions}" for name, positions in BOTH])
# Rectified far pairs differ from the original: see test_rectified_positions_are_those_of_the_definition.
EXACT = [(*one, way) for one in BOTH for way in FINE if (one[1], way) != ("rectified", "many codes")]


@pytest.mark.parametrize(("name", "positions", "way"), EXACT, ids=["-".join(one) for one in EXACT])
def test_with_one_code_per_key_it_is_the_original(name, positions, way):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    expected = output(model, **inputs)
    report = replace_attention(model, **FINE[way], far_positions=positions, calibration=[inputs])
    assert len(report.replaced) == len(report.layers) >= 2
    assert_close(family.real(output(model, **inputs)), family.real(expected), name)
    report.restore()
    assert torch.equal(output(model, **inputs), expected)
    assert not any("longvq" in name for name in model.state_dict())


@both
def test_equals_the_dense_definition(name, positions):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    expected, outputs = output(model, **inputs), {}
    for backend in ("reference", "torch", "auto"):
        options = {**COARSE, "far_positions": positions, "calibration": [inputs], "backend": backend}
        report = replace_attention(model, **options)
        outputs[backend] = family.real(output(model, **inputs))
        report.restore()
    assert_close(outputs["torch"], outputs["reference"], "torch")
    assert_close(outputs["auto"], outputs["reference"], "auto")
    assert (outputs["torch"] - family.real(expected)).abs().max() > 1e-3  # the codes change the output


@pytest.mark.parametrize("name", ROTARY)
def test_rectified_positions_are_those_of_the_definition(name):
    model, ids = ROTARY[name].build(), tokens(length=LENGTH)
    expected = _with_clamped_positions(model, ids, window=7)
    reports = []
    # One by one: the codes of the second layer are fitted to keys after the replaced first layer.
    for layer in (".0.", ".1."):
        options = {"num_codes": ALL_KEYS, "window": 7, "variance_correction": False, "calibration": [ids]}
        choice = {"filter_fn": lambda module, name, layer=layer: layer in name}
        reports.append(replace_attention(model, **options, **choice, far_positions="rectified"))
    assert_close(output(model, ids), expected, name)
    how = [report.replaced[0].far_positions for report in reports]
    assert how[0] == "rectified" and (how[1] == "rectified" or name == "smollm3")  # its second layer has no positions
    for report in reports[::-1]:
        report.restore()
    assert (output(model, ids) - expected).abs().max() > 1e-3


def _with_clamped_positions(model: nn.Module, ids: Tensor, window: int) -> Tensor:
    """Logits of the model with a second implementation of dense attention with clamped positions."""
    from transformers import AttentionInterface

    AttentionInterface.register("clamped_for_tests", lambda module, *args, **kwargs: attend(module, *args, **kwargs))
    frequencies = model.base_model.rotary_emb.inv_freq.double()

    def rotate(x: Tensor, position: Tensor) -> Tensor:  # x (B, H, L, D), position (L,)
        angle = position.double()[:, None] * frequencies  # (L, n/2)
        half = frequencies.numel()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def attend(module, q, k, v, attention_mask, scaling, **kwargs):
        q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        i = torch.arange(q.shape[2])
        near = scaling * q @ k.mT
        if getattr(module, "use_rope", True):
            q, k = rotate(rotate(q, -i), torch.full_like(i, window)), rotate(k, -i)
        far = scaling * q @ k.mT
        distance = i[:, None] - i
        scores = torch.where(distance < window, near, far).masked_fill(distance < 0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).float().contiguous(), None

    model = copy.deepcopy(model)
    model.set_attn_implementation("clamped_for_tests")
    return output(model, ids)


@both
def test_gradients_reach_the_same_parameters_as_before(name, positions):
    family = FAMILIES[name]
    model, inputs = family.build().train(), family.inputs()
    family.real(model(**inputs)[0]).square().mean().backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    replace_attention(model, **COARSE, far_positions=positions, calibration=[inputs])
    (family.real(model(**inputs)[0]).square().mean() + commitment_loss(model)).backward()
    assert [name for name, _ in model.named_parameters()] == list(before)
    for parameter, old in zip(model.parameters(), before.values(), strict=True):
        assert (parameter.grad is None) == (old is None)
    for name, parameter in model.named_parameters():
        if before[name] is None:
            continue
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or not before[name].abs().max() > 1e-6, name


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("positions", ["auto", "rotated"])
def test_generation_with_a_cache_is_the_full_forward(name, positions):
    model, inputs = DECODERS[name].build(), {"input_ids": tokens(length=23)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :6] = 0
    replace_attention(model, **COARSE, far_positions=positions, calibration=[tokens(length=LENGTH)])
    cached = model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(7):
        places = {} if name == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        logits = output(model, input_ids=ids, attention_mask=mask, **places, use_cache=False)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("chosen", ["strict=False", "filter_fn"])
def test_bart_keeps_its_cross_attention(chosen):
    model, inputs = bart(), bart_inputs()
    real = slice(None)  # only the encoder's inputs are padded
    expected = output(model, **inputs)
    choice = {"strict": False} if chosen == "strict=False" else {"filter_fn": lambda module, name: "self_attn" in name}
    for options in FINE.values():
        report = replace_attention(model, **options, calibration=[inputs], **choice)
        assert [layer.name for layer in report.skipped] == ["model.decoder.layers.0.encoder_attn"]
        assert {layer.name: layer.causal for layer in report.replaced} == {
            "model.encoder.layers.0.self_attn": "no",
            "model.decoder.layers.0.self_attn": "yes",
        }
        assert_close(output(model, **inputs)[real], expected[real], chosen)
        report.restore()
        assert torch.equal(output(model, **inputs), expected)


def test_bart_equals_the_definition_learns_and_generates():
    model, inputs = bart(), bart_inputs()
    outputs = []
    for backend in ("reference", "auto"):
        report = replace_attention(model, **COARSE, calibration=[inputs], strict=False, backend=backend)
        outputs.append(output(model, **inputs))
        if backend == "reference":
            report.restore()
    assert_close(*outputs[::-1], "bart")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    greedy = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **greedy), model.generate(**prompt, **greedy, use_cache=False))
    model.train()
    (model(**inputs)[0].square().mean() + commitment_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_t5_is_refused_for_its_position_bias():
    model = t5()
    with pytest.raises(NotImplementedError, match="additive position bias"):
        replace_attention(model, **COARSE, calibration=[tokens()])


def test_the_real_rows_leave_padding_out():
    family = FAMILIES["bert"]
    assert isinstance(family, Family) and len(family.real(torch.zeros(2, LENGTH, 3))) == 2 * LENGTH - 9
