"""Files that version 0.1.0 saved load and give the same outputs and curves.

`data/saved_before/make.py` made the files and lists them.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

import longvq_layers.models.huggingface  # noqa: F401  registers the Auto classes
from longvq_layers import layers, models
from longvq_layers.replace import distill_attention, load_replaced
from longvq_layers.train import Trainer, TrainSettings

SAVED = Path(__file__).parent / "data" / "saved_before"

# Another processor sums in another order. The files hold float32, and the models are a layer or two deep.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Steps of Adam on top of that: it divides by the size of small gradients.
CLOSE_AFTER_STEPS = {"rtol": 1e-3, "atol": 1e-4}


def expected_of(folder: str) -> dict:
    return torch.load(SAVED / folder / "expected.pt", weights_only=True)


def layer_names() -> list[str]:
    with safe_open(SAVED / "layers.safetensors", "pt") as file:
        return sorted(file.metadata())


def layer_case(name: str) -> tuple[nn.Module, dict[str, Tensor], list[Tensor], Tensor]:
    """A fresh layer, and the state dict, the inputs and the output that were saved."""
    with safe_open(SAVED / "layers.safetensors", "pt") as file:
        made_with = json.loads(file.metadata()[name])
        keys, prefix = sorted(file.keys()), f"{name}/state/"
        state = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
        inputs = [file.get_tensor(key) for key in keys if key.startswith(f"{name}/inputs/")]
        output = file.get_tensor(f"{name}/output")
    cls = getattr({"layers": layers, "models": models}[made_with["module"]], made_with["class"])
    return cls(**made_with["options"]), state, inputs, output


@pytest.mark.parametrize("name", layer_names())
def test_state_dicts_of_layers(name):
    layer, state, inputs, output = layer_case(name)
    assert set(layer.state_dict()) == set(state)
    layer.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(*inputs), output, **CLOSE)


def test_every_layer_is_among_the_files():
    """A layer that is added later is saved by its own version; none of these may be lost."""
    saved = {type(layer_case(name)[0]).__name__ for name in layer_names()}
    known = {
        "Codebook",
        "CodebookAttention",
        "CrossAttention",
        "DampedEMA",
        "DenseAttention",
        "DiagonalSSM",
        "LocalAttention",
        "LongVQBlock",
        "MegaBlock",
        "S4DBlock",
        "S4DLayer",
        "SPADEBlock",
        "TransformerBlock",
        "VQAttention",
    }
    assert saved == known


@pytest.mark.parametrize(
    ("folder", "auto_class"),
    [("causal_lm", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)],
)
def test_hugging_face_models(folder, auto_class):
    expected = expected_of(folder)
    model, loading = auto_class.from_pretrained(SAVED / folder, output_loading_info=True)
    assert not any(loading.values()), loading
    check_outputs(model, expected)


@pytest.mark.parametrize("folder", ["replaced_llama", "replaced_bert"])
def test_replaced_models(folder):
    expected, model = expected_of(folder), fresh(folder)
    load_replaced(model, SAVED / folder)
    check_outputs(model, expected)


def fresh(folder: str) -> nn.Module:
    """A model with its original attention and other weights than the saved one."""
    config = AutoConfig.from_pretrained(SAVED / folder)
    if config.model_type == "bert":
        return BertModel(config, add_pooling_layer=False).eval()
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def check_outputs(model: nn.Module, expected: dict) -> None:
    torch.testing.assert_close(model(**expected["inputs"])[0], expected["output"], **CLOSE)
    if "generated" in expected:  # greedily; the best logit was ahead by more than 0.01 at every token
        length = expected["generated"].shape[1]
        tokens = model.generate(**expected["inputs"], max_length=length, do_sample=False)
        assert torch.equal(tokens, expected["generated"])


def log_of(path: Path) -> list[dict[str, float]]:
    """The lines of a log without the column of times and without empty columns."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(text) for name, text in row.items() if text and name != "seconds"} for row in rows]


def test_a_training_run_goes_on_to_the_same_curve(tmp_path):
    folder = shutil.copytree(SAVED / "training", tmp_path / "run")
    settings = TrainSettings(**json.loads((folder / "settings.json").read_text()))
    trainer = Trainer(settings, folder)
    assert trainer.step == 4
    trainer.run()
    whole, resumed = log_of(folder / "whole.csv"), log_of(folder / "log.csv")
    assert [row["step"] for row in resumed] == [2, 4, 6, 8]
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=CLOSE_AFTER_STEPS["rtol"], abs=1e-7)


def test_a_distillation_goes_on_to_the_same_curve(tmp_path):
    checkpoint = Path(shutil.copy(SAVED / "distillation" / "checkpoint.pt", tmp_path))
    expected, model = expected_of("distillation"), fresh("replaced_llama")
    load_replaced(model, SAVED / "replaced_llama")
    taken = []
    report = distill_attention(
        model, expected["data"], **expected["options"], checkpoint=checkpoint, progress=taken.append
    )
    assert [point.step for point in taken] == [8, 12]  # the first two evaluations stand in the checkpoint
    curve = [(point.phase, point.step, point.error, point.train_error) for point in report.curve]
    for mine, theirs in zip(curve, expected["curve"], strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2:] == pytest.approx(theirs[2:], rel=CLOSE_AFTER_STEPS["rtol"], nan_ok=True)
    assert report.before == pytest.approx(expected["before"], rel=CLOSE["rtol"])
    assert report.after == pytest.approx(expected["after"], rel=CLOSE_AFTER_STEPS["rtol"])
    with torch.no_grad():
        torch.testing.assert_close(model(**expected["inputs"])[0], expected["output"], **CLOSE_AFTER_STEPS)
