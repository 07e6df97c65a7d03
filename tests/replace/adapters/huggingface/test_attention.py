"""Transformers models: equal to the dense definition, and what must never influence an output."""

import copy
import math

import pytest
import torch

from longvq_layers import commitment_loss
from longvq_layers.models.huggingface.cache_name import NAME
from longvq_layers.replace import replace_attention
from tests.largest import LargestTensor
from tests.replace.models import CAUSAL, COARSE, FAMILIES, FINE, bert, gpt2, llama, output, padded, tokens
from tests.tolerances import assert_close


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("local_keys", ["exact", "quantized"])
def test_one_code_per_key_is_the_original_model(family, local_keys):
    model, inputs = FAMILIES[family](), padded("right")
    expected = output(model, **inputs)
    report = replace_attention(model, **FINE, local_keys=local_keys, calibration=[inputs])
    real = inputs["attention_mask"].bool()
    assert_close(output(model, **inputs)[real], expected[real], family)
    assert all(layer.key_error < 1e-6 and layer.output_error < 1e-4 for layer in report.replaced)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_dense_definition(family, window, side):
    model, inputs = FAMILIES[family](), padded(side)
    original = output(model, **inputs)
    dense = copy.deepcopy(model)
    options = {"num_codes": 8, "window": window, "calibration": [inputs]}
    replace_attention(model, **options, backend="torch")
    replace_attention(dense, **options, backend="reference")
    assert_close(output(model, **inputs), output(dense, **inputs), family)
    assert (output(model, **inputs) - original).abs().max() > 1e-2  # the codes change the output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("partial", [False, True])
def test_padded_tokens_never_matter(family, side, partial):
    model, inputs = FAMILIES[family](), padded(side)
    filter_fn = (lambda module, name: ".0." in name) if partial else None
    replace_attention(model, **COARSE, calibration=[inputs], filter_fn=filter_fn)
    real = inputs["attention_mask"].bool()
    before = output(model, **inputs)
    inputs["input_ids"] = torch.where(real, inputs["input_ids"], tokens(seed=7))
    after = output(model, **inputs)
    assert torch.equal(before[real], after[real])
    # A row gives the same result with and without its padding, so positions, codes and masks agree.
    alone = {name: value[-1:, real[-1]] for name, value in inputs.items()}
    assert_close(output(model, **alone)[0], after[-1, real[-1]], f"{family} without padding")


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("mask", ["none", "ones", "left"])
@pytest.mark.parametrize("partial", [False, True])
def test_the_future_never_matters(family, mask, partial):
    model, inputs = CAUSAL[family](), padded("left")
    if mask == "none":
        inputs = {"input_ids": tokens()}
    elif mask == "ones":
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 37, dtype=torch.long)}
    filter_fn = (lambda module, name: ".1." in name) if partial else None
    replace_attention(model, **COARSE, calibration=[inputs], filter_fn=filter_fn)
    before = output(model, **inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 20:] = tokens(seed=7)[:, 20:]
    after = output(model, **inputs)
    assert torch.equal(before[:, :20], after[:, :20])
    inputs["input_ids"][:, 12] = 5
    assert (output(model, **inputs)[:, 20:] - after[:, 20:]).abs().max() > 1e-4  # the past does matter


def test_both_sides_matter_in_an_encoder():
    model, ids = bert(), tokens()
    replace_attention(model, **COARSE, calibration=[ids])
    before = output(model, ids)
    for position in (0, 36):
        changed = ids.clone()
        changed[:, position] = 5
        assert (output(model, changed) - before)[:, 18].abs().max() > 1e-5


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("side", [None, "left"])
def test_generation_with_a_cache_is_the_full_forward(family, side):
    model = CAUSAL[family]()
    inputs = padded("left", length=23, padding=6) if side else {"input_ids": tokens(length=23)}
    replace_attention(model, **COARSE, calibration=[{"input_ids": tokens()}])
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    inputs.pop("position_ids", None)
    cached = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(9):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = output(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompt_in_pieces_is_the_prompt(family):
    model, ids = CAUSAL[family](), tokens()
    replace_attention(model, **COARSE, calibration=[ids])
    whole = output(model, ids)
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:], **{NAME: getattr(first, NAME)}, use_cache=True)
    assert_close(first.logits, whole[:, :20], "first piece")
    assert_close(second.logits, whole[:, 20:], "second piece")


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_any_length(family):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = FAMILIES[family]()

        def forward(self, ids, mask):
            options = {"use_cache": False} if family != "bert" else {}
            return self.model(ids, attention_mask=mask, **options)[0]

    model, inputs = Plain().eval(), padded("right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    replace_attention(model, **COARSE, calibration=[(ids, mask)])
    length = torch.export.Dim("length", min=2, max=512)
    with torch.no_grad():
        exported = torch.export.export(model, (ids, mask), dynamic_shapes=({1: length}, {1: length}), strict=False)
        for size in (37, 20):
            given = ids[:, :size], mask[:, :size]
            assert_close(exported.module()(*given), model(*given), f"{family}, {size}")


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_linearly(family):
    model = FAMILIES[family]()
    model.requires_grad_(False)
    replace_attention(model, num_codes=8, window=8, calibration=[tokens()])
    largest = []
    for length in (1024, 2048):
        mask = torch.ones(1, length, dtype=torch.long)
        mask[:, -3:] = 0
        with LargestTensor() as recorded:
            output(model, input_ids=tokens(1, length), attention_mask=mask)
        largest.append(recorded.bytes)
    assert largest[1] < 2048 * 2048 / 2  # bytes; nowhere near L x L (one head of it in float32 is 16 MB)
    assert largest[1] < 2.5 * largest[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_learning(family):
    model = FAMILIES[family]().train()
    replace_attention(model, **COARSE)  # in training mode codebooks start from the first batch
    slot = next(module for module in model.modules() if type(module).__name__ == "SwappedAttention")
    out = model(tokens())[0]
    loss = commitment_loss(model)
    assert loss.item() > 0
    (out.square().mean() + loss).backward()
    trainable = [(name, parameter.grad) for name, parameter in model.named_parameters() if "pooler" not in name]
    assert [name for name, grad in trainable if grad is None or not grad.isfinite().all()] == []
    codes = slot.codebook.embedding.clone()
    model(tokens(seed=3))
    model(tokens(seed=4))
    assert not torch.equal(codes, slot.codebook.embedding)  # the moving averages learn in training
    model.eval()
    codes = slot.codebook.embedding.clone()
    model(tokens(seed=5))
    assert torch.equal(codes, slot.codebook.embedding)


def test_state_dict_carries_the_codes():
    model, other, ids = llama(), llama(), tokens()
    replace_attention(model, **COARSE, calibration=[ids])
    replace_attention(other, **COARSE, calibration=[tokens(seed=9)])
    assert any(name.endswith("longvq.codebook.embedding") for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(model, ids), output(other, ids))
    learning = llama().train()
    replace_attention(learning, **COARSE)
    learning.load_state_dict(model.state_dict())
    assert torch.equal(output(learning.eval(), ids), output(model, ids))


def test_compiles_into_one_graph_with_equal_values():
    model, inputs = bert(), padded("right")
    inputs.pop("position_ids")
    replace_attention(model, **COARSE, calibration=[inputs])
    expected = output(model, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output(compiled, **inputs), expected, "compiled")
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays_and_codes_keep_their_precision(dtype):
    model, ids = bert().to(dtype), tokens()
    expected = output(model, ids)
    replace_attention(model, **FINE, calibration=[ids])
    assert_close(output(model, ids), expected, str(dtype))
    assert output(model, ids).dtype == dtype
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == at_least for name, x in model.state_dict().items() if "longvq" in name and "metric" in name)


def test_autocast_and_later_dtype_changes():
    # Rounding to 8 bits affects the whole model, so its effect on the original model is the measure.
    model, ids = llama(), tokens()
    exact = output(model, ids)
    half = output(copy.deepcopy(model).to(torch.bfloat16), ids)
    allowed = 2 * (half - exact).abs().max()
    replace_attention(model, **FINE, calibration=[ids])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (output(model, ids) - exact).abs().max() < allowed
    model.to(torch.bfloat16)
    assert model.model.layers[0].self_attn.longvq.codebook.embedding.dtype == torch.float32
    assert (output(model, ids) - exact).abs().max() < allowed


def test_lengths_of_one_and_all_padding():
    model = llama()
    replace_attention(model, **COARSE, calibration=[tokens()])
    assert output(model, tokens(2, 1)).isfinite().all()
    nothing = torch.zeros(2, 11, dtype=torch.long)
    assert output(model, tokens(2, 11), attention_mask=nothing).isfinite().all()


def test_scaling_of_the_module_is_used():
    model, ids = gpt2(scale_attn_by_inverse_layer_idx=True), tokens()
    expected = output(model, ids)
    replace_attention(model, **FINE, calibration=[ids])
    assert math.isclose(model.transformer.h[1].attn.scaling, 12**-0.5 / 2)
    assert_close(output(model, ids), expected, "scaled by layer")


def test_the_spread_of_codes_is_learned_too_and_checkpointing_learns_once():
    spreads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        replace_attention(model, **COARSE, calibration=[tokens()])
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
            (enable or model.gradient_checkpointing_enable)()
        slot = model.encoder.layer[0].attention.self.longvq
        start = slot.spread.clone()
        for seed in (3, 4, 5):
            model(tokens(seed=seed))[0].square().mean().backward()
        assert not torch.equal(slot.spread, start) and slot.spread.isfinite().all()
        spreads.append(
            (slot.spread_sum.clone(), slot.codebook.ema_count.clone(), model.get_input_embeddings().weight.grad)
        )
    for plain, checkpointed in zip(*spreads, strict=True):
        assert_close(checkpointed, plain, "checkpointing")
