"""Replaced models with other tools: PEFT, Trainer, checkpointing, compilers, dtypes, several models at once."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from longvq_layers.replace import distill_attention, load_replaced, replace_attention, restore_attention
from tests.replace.models import COARSE, bert, gpt2, llama, output, padded, tokens
from tests.tolerances import assert_close

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "key", "value"]}
BUILDERS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def lora(model, family):
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False))


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)  # peft warns about GPT-2 and about transformers
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(family, order):
    torch.manual_seed(0)
    model, inputs = BUILDERS[family](), padded("right")
    if order == "before":
        model = lora(model, family).eval()
        adapted = output(model, **inputs)
        report = replace_attention(model, **COARSE, calibration=[inputs])
        assert len(report.replaced) == 2
    else:
        replace_attention(model, **COARSE, calibration=[inputs])
        model = lora(model, family).eval()
    swapped = output(model, **inputs)
    model.train()
    model(**inputs)[0].square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(output(merged, **inputs), output(model, **inputs), "merged")
    restore_attention(model)
    assert (output(model, **inputs) - swapped).abs().max() > 1e-3
    if order == "before":
        assert_close(output(model, **inputs), adapted, "restored")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # older transformers don't know the new name of this option
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing_changes_nothing(family):
    inputs, found = padded("right"), []
    inputs.pop("position_ids")
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = BUILDERS[family]()
        replace_attention(model, **COARSE, calibration=[inputs])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for _ in range(2):
            model(**inputs)[0].square().mean().backward()
        found.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())
        )
    for name in found[0]:
        assert_close(found[1][name].double(), found[0][name].double(), name)


@pytest.mark.parametrize("positions", ["rectified", "rotated"])
def test_compiled_rotary_models(positions):
    model, ids = llama(), tokens()
    replace_attention(model, **COARSE, calibration=[ids], far_positions=positions)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    expected = output(model, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output(compiled, **inputs), expected, "compiled")
    torch._dynamo.reset()


@pytest.mark.parametrize("positions", ["rectified", "rotated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_rotary_models(positions, dtype):
    model, ids = llama(), tokens()
    replace_attention(model, **COARSE, calibration=[ids], far_positions=positions)
    expected = output(model, ids)
    model.to(dtype)
    swapped = output(model, ids)
    assert swapped.dtype == dtype and swapped.isfinite().all()
    assert (swapped.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    generated = model.generate(ids[:, :9], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 13)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert output(model.float(), ids).isfinite().all()


@pytest.mark.parametrize("positions", ["rectified", "rotated"])
def test_calibrated_in_half_precision(positions):
    model, ids = llama().to(torch.bfloat16), tokens()
    original = output(model, ids)
    replace_attention(model, num_codes=96, window=5, calibration=[ids], far_positions="rotated")
    assert (output(model, ids) - original).float().abs().mean() < 0.05 * original.float().abs().mean()
    restore_attention(model)
    replace_attention(model, num_codes=96, window=64, calibration=[ids], far_positions=positions)
    assert (output(model, ids) - original).float().abs().mean() < 0.05 * original.float().abs().mean()


def test_trainer_trains_and_saves_what_load_replaced_reads(tmp_path):
    model, ids = llama(), tokens(8, 40)
    replace_attention(model, **COARSE, calibration=[ids])
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", logging_strategy="no", **options)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("codebook" in name for name in changed) and any("q_proj" in name for name in changed)
    trainer.save_model(str(tmp_path / "model"))
    fresh = llama()
    load_replaced(fresh, tmp_path / "model")
    assert torch.equal(output(fresh, ids), output(model.eval(), ids))


def test_several_models_in_one_process():
    models, ids = [llama(), gpt2(), bert(), llama()], tokens()
    originals = [output(model, ids) for model in models]
    for model in models[:3]:
        replace_attention(model, **COARSE, calibration=[ids])
    assert torch.equal(output(models[3], ids), originals[3])
    swapped = [output(model, ids) for model in models[:3]]
    restore_attention(models[1])
    for i in (0, 2):
        assert torch.equal(output(models[i], ids), swapped[i])
    for i in (0, 2):
        restore_attention(models[i])
    for model, original in zip(models, originals, strict=True):
        assert torch.equal(output(model, ids), original)


def test_device_moves_take_everything_along():
    model = llama()
    replace_attention(model, **COARSE, calibration=[tokens()])
    model.to("meta")
    assert all(x.is_meta for x in [*model.parameters(), *model.model.layers[0].self_attn.longvq.buffers()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_dynamic_int8(family, order):
    model, inputs = BUILDERS[family](), padded("right")
    if order == "after":
        replace_attention(model, **COARSE, calibration=[inputs])
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    if order == "before":
        replace_attention(model, **COARSE, calibration=[inputs])
    swapped = output(model, **inputs)
    restore_attention(model)
    assert swapped.isfinite().all() and not torch.equal(swapped, output(model, **inputs))


class Features(torch.nn.Module):
    """Returns its dict of inputs with more entries, as sentence encoders do."""

    def __init__(self):
        super().__init__()
        self.encoder = bert()

    def forward(self, features):
        features["token_embeddings"] = self.encoder(**features)[0]
        return features


def test_a_model_that_adds_to_its_dict():
    model, batches = Features(), [({"input_ids": tokens(2, 60, seed=seed)},) for seed in range(3)]
    report = replace_attention(model, **COARSE, calibration=batches)
    assert all(list(features) == ["input_ids"] for (features,) in batches)
    inner = bert()
    inner.load_state_dict(model.encoder.state_dict(), strict=False)
    expected = replace_attention(inner, **COARSE, calibration=[features["input_ids"] for (features,) in batches])
    assert [layer.output_error for layer in report.layers] == [layer.output_error for layer in expected.layers]
    report = distill_attention(model, batches, steps=2, end_to_end=2, projections=True)
    assert 0 < report.before["(model output)"] < 2
