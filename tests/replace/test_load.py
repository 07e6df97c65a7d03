"""load_replaced: a replaced model is equal after any way of saving it; a file that doesn't fit changes nothing."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, BertModel, GPT2LMHeadModel, LlamaForCausalLM

from longvq_layers.replace import load_replaced, replace_attention, restore_attention
from tests.replace.models import COARSE, bert, encoder, gpt2, llama, output, padded, tokens

CLASSES = {"bert": BertModel, "gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
BUILDERS = {"bert": bert, "gpt2": gpt2, "llama": llama}


def other(family):
    """A model of the same class with other weights."""
    torch.manual_seed(5)
    return BUILDERS[family]()


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("way", ["folder", "shards", "safetensors", "torch.save", "state dict"])
def test_round_trip(family, way, tmp_path):
    model, inputs = BUILDERS[family](), padded("right")
    replace_attention(model, **COARSE, calibration=[inputs])
    expected, state = output(model, **inputs), model.state_dict()
    if way in ("folder", "shards"):
        model.save_pretrained(tmp_path, max_shard_size="20KB" if way == "shards" else "5GB")
        assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (way == "shards")
    elif way == "safetensors":
        once = {value.data_ptr(): key for key, value in reversed(state.items())}  # tied weights
        save_file({key: state[key].contiguous() for key in once.values()}, tmp_path / "x.safetensors")
    elif way == "torch.save":
        torch.save(state, tmp_path / "x.pt")
    path = {"safetensors": tmp_path / "x.safetensors", "torch.save": tmp_path / "x.pt", "state dict": state}
    fresh = other(family)
    untouched = output(fresh, **inputs)
    report = load_replaced(fresh, path.get(way, str(tmp_path)))
    assert torch.equal(output(fresh, **inputs), expected)
    assert len(report.replaced) == 2 and report.replaced[0].num_codes == 8 and report.replaced[0].window == 5
    report.restore()
    assert not torch.equal(output(fresh, **inputs), untouched)  # the saved weights, with the original attention
    restore_attention(model)
    assert torch.equal(output(fresh, **inputs), output(model, **inputs))


def test_a_model_made_from_its_config_alone(tmp_path):
    model, inputs = llama(), padded("right")
    replace_attention(model, **COARSE, calibration=[inputs])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert "longvq" not in (tmp_path / "config.json").read_text()  # so that the model loads as its own class
    fresh = LlamaForCausalLM(config).eval()
    load_replaced(fresh, tmp_path)
    assert torch.equal(output(fresh, **inputs), output(model, **inputs))
    assert torch.equal(
        fresh.generate(tokens(), max_new_tokens=5, do_sample=False),
        model.generate(tokens(), max_new_tokens=5, do_sample=False),
    )


@pytest.mark.parametrize("partial", [False, True])
def test_parts_and_dense_masks_stay_as_they_were(partial):
    model, inputs = bert(), padded("right")
    replace_attention(
        model, **COARSE, calibration=[inputs], filter_fn=(lambda module, name: ".0." in name) if partial else None
    )
    fresh = other("bert")
    report = load_replaced(fresh, model.state_dict())
    assert torch.equal(output(fresh, **inputs), output(model, **inputs))
    assert len(report.skipped) == partial


def test_torch_modules_and_training_state():
    model, x = encoder(), torch.randn(2, 30, 32)
    replace_attention(model, **COARSE, calibration=[x])
    fresh = encoder().train()
    load_replaced(fresh, model.state_dict())
    assert fresh.layers[0].self_attn.longvq.training
    assert torch.equal(output(fresh.eval(), x), output(model, x))


def test_pickles_and_deep_copies_are_replaced_models():
    model, inputs = llama(), padded("left")
    replace_attention(model, **COARSE, calibration=[inputs])
    expected = output(model, **inputs)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(output(copied, **inputs), expected)
        restore_attention(copied)
        assert "longvq" not in copied.model.layers[0].self_attn._modules
    assert torch.equal(output(model, **inputs), expected)


def test_codes_of_other_settings_are_refused_by_load_state_dict():
    model, other_model = bert(), bert()
    replace_attention(model, num_codes=8, window=5, calibration=[tokens()])
    replace_attention(other_model, num_codes=8, window=6, calibration=[tokens()])
    with pytest.raises(ValueError, match="window=5, here 6"):
        other_model.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: [s.pop(key) for key in list(s) if "longvq" in key], ValueError, "no replaced attention"),
        (lambda s: s.pop("embeddings.LayerNorm.weight"), ValueError, "missing: embeddings.LayerNorm.weight"),
        (lambda s: s.update(more=torch.ones(3)), ValueError, "unknown here: more"),
        (lambda s: s.update({"embeddings.LayerNorm.weight": torch.ones(3)}), ValueError, "of another shape"),
        (lambda s: s.update({key: s[key][:9] for key in s if key.endswith("_extra_state")}), ValueError, "cut"),
        (
            lambda s: s.update({key.replace("layer.1", "layer.7"): s[key] for key in list(s) if "layer.1" in key}),
            ValueError,
            "got none at .*layer.7.attention.self",
        ),
        (
            lambda s: s.pop("encoder.layer.1.attention.self.longvq.codebook.embedding"),
            RuntimeError,
            "embedding",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change, error, message):
    model, inputs = bert(), padded("right")
    replace_attention(model, **COARSE, calibration=[inputs])
    state = model.state_dict()
    change(state)
    fresh = other("bert")
    before, modules = output(fresh, **inputs), [type(m) for m in fresh.modules()]
    with pytest.raises(error, match=message):
        load_replaced(fresh, state)
    assert torch.equal(output(fresh, **inputs), before) and [type(m) for m in fresh.modules()] == modules
    assert not any(m._forward_pre_hooks for m in fresh.modules())


def test_wrong_paths_and_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_replaced(bert(), tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_replaced(bert(), tmp_path)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        load_replaced("bert", tmp_path)
    model = bert()
    replace_attention(model, **COARSE, calibration=[tokens()])
    with pytest.raises(ValueError, match="already replaced"):
        load_replaced(model, model.state_dict())


def test_as_a_context_it_restores():
    model, inputs = bert(), padded("right")
    expected = output(model, **inputs)
    with replace_attention(model, **COARSE, calibration=[inputs]) as report:
        assert not torch.equal(output(model, **inputs), expected)
    assert torch.equal(output(model, **inputs), expected)
    with pytest.raises(ValueError, match="already"):
        report.restore()
    with replace_attention(model, **COARSE, calibration=[inputs]) as report:
        report.restore()  # restoring before the end of the block is allowed
    with pytest.raises(KeyError), replace_attention(model, **COARSE, calibration=[inputs]):
        raise KeyError
    assert torch.equal(output(model, **inputs), expected)
    with replace_attention(model, **COARSE, dry_run=True):
        pass


def test_saved_before_any_training():
    """A rotary model that was saved before a call detected its rotated columns."""
    model = llama().train()
    replace_attention(model, **COARSE, far_positions="rectified")
    fresh = other("llama").train()
    load_replaced(fresh, model.state_dict())
    ids = tokens(2, 30)
    torch.manual_seed(0)
    expected = model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(fresh(ids).logits, expected)


def test_the_meta_device_is_refused():
    model = llama()
    replace_attention(model, **COARSE, calibration=[tokens(2, 40)])
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(
        ValueError, match=r"load_replaced: model must have parameters with values, got .* on the meta device"
    ):
        load_replaced(empty, model.state_dict())
    with pytest.raises(
        ValueError, match=r"replace_attention: model must have parameters with values, got .* on the meta device"
    ):
        replace_attention(empty, **COARSE, calibration=[tokens(2, 40)])
    replace_attention(empty, **COARSE, calibration=[tokens(2, 40)], dry_run=True)


@pytest.mark.parametrize("way", ["state dict", "safetensors"])
def test_a_module_in_several_places(way, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        return torch.nn.Sequential(layer, torch.nn.Identity(), layer).eval()

    model, fresh, x = build(0), build(1), torch.randn(2, 40, 32)
    replace_attention(model, **COARSE, calibration=[x])
    state = model.state_dict()
    if way == "safetensors":  # the format holds each tensor once, under its first or last name
        once = {value.data_ptr(): key for key, value in state.items()}
        save_file({key: state[key].contiguous() for key in once.values()}, tmp_path / "x.safetensors")
    report = load_replaced(fresh, state if way == "state dict" else tmp_path / "x.safetensors")
    assert torch.equal(fresh(x), model(x)) and len(report.replaced) == 1


def test_other_modules_may_have_extra_state():
    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    def build():
        return torch.nn.Sequential(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), Extra(32, 2)).eval()

    model, fresh, x = build(), build(), torch.randn(2, 40, 32)
    replace_attention(model, **COARSE, calibration=[x])
    load_replaced(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x)) and fresh[1].calls == 3
