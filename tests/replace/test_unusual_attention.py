"""Models whose attention is a little different from what their class says; the sweep over all models found them."""

import pytest
import torch
from transformers import (
    BeamConfig,
    BeamModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma3nTextModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longvq_layers.models.huggingface.cache_name import NAME
from longvq_layers.replace import replace_attention
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.context import ForwardContext, claim_context, store_context
from tests.replace.models import TOKENS, VOCABULARY, bert, gpt2, output, tokens
from tests.tolerances import assert_close

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SIZES |= {"vocab_size": VOCABULARY, "head_dim": 8, "initializer_range": 0.3, **TOKENS}
COARSE = {"num_codes": 8, "window": 5}


def gemma3n(shared: int) -> Gemma3nTextModel:
    """Four layers that take turns; the last `shared` of them read the keys of earlier ones."""
    config = Gemma3nTextConfig(
        **SIZES,
        num_hidden_layers=4,
        num_kv_shared_layers=shared,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nTextModel(config).eval()


def diffllama(**changes) -> DiffLlamaForCausalLM:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, num_hidden_layers=2, **changes)).eval()


def test_a_rotation_of_one_tensor_is_taken_off_too():
    model, ids = gemma3n(shared=0), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=4, window=64, calibration=[ids], strict=False)
    assert [layer.far_positions for layer in report.replaced] == ["rectified"] * 2
    assert_close(output(model, ids), expected, "wide window")


@pytest.mark.parametrize("build", [lambda: gemma3n(shared=2), diffllama], ids=["shared keys", "attends twice"])
def test_keys_that_are_needed_stay_in_the_cache(build):
    model, ids = build(), tokens()
    report = replace_attention(model, **COARSE, calibration=[ids], strict=False)
    assert [layer.far_positions for layer in report.replaced] == ["rotated"] * 2
    whole = output(model, ids)
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:], **{NAME: first[NAME]}, use_cache=True)
    assert_close(second[0], whole[:, 20:], "in two pieces")


def test_a_second_attention_has_the_positions_of_the_first_and_no_cache():
    slot = torch.nn.Module()
    slot.contexts = {}
    rotation = (torch.ones(1), torch.zeros(1))
    store_context(slot, ForwardContext(rotation, None))
    assert [claim_context(slot).rotation for _ in range(2)] == [rotation] * 2
    store_context(slot, ForwardContext(rotation, object()))
    claim_context(slot)
    with pytest.raises(NotImplementedError, match="attends more than once"):
        claim_context(slot)


def test_layers_without_positions_beside_layers_with():
    config = BeamConfig(**SIZES, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    model, ids = BeamModel(config).eval(), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=4, window=64, calibration=[ids], strict=False)
    assert [layer.name for layer in report.replaced] == ["layers.1.self_attn"]
    assert_close(output(model, ids), expected, "wide window")


def test_a_cache_of_sums_has_no_keys_to_look_at():
    model, cache = gpt2(), DynamicCache()
    replace_attention(model, **COARSE, calibration=[tokens()])
    output(model, tokens(), **{NAME: cache}, use_cache=True)
    for name in ("keys", "values"):
        with pytest.raises(NotImplementedError, match="looks for keys in its cache"):
            getattr(cache.layers[0], name)


@pytest.mark.parametrize("calibrated", [False, True])
def test_eager_attention_without_a_mask_sees_the_future(calibrated):
    model = bert(attn_implementation="eager")
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True  # as some classes say wrongly; only fused attention would listen
    module, x = model.encoder.layer[0].attention, torch.randn(2, 9, 32)
    expected = output(module, x)
    if calibrated:
        replace_attention(module, num_codes=32, window=16, calibration=[x])
    else:
        replace_attention(module.train(), num_codes=32, window=16)
        output(module, x)
    assert_close(output(module.eval(), x), expected, "sees the future")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("indexed_attention", "layers of type 'indexed_attention'"),
        ("chunked_attention", "sliding-window attention .chunked_attention."),
    ],
)
def test_other_types_of_layers_are_refused_by_name(kind, reason):
    model = gpt2()
    model.config.layer_types = [kind, "full_attention"]
    with pytest.raises(NotImplementedError, match=reason):
        replace_attention(model, **COARSE, calibration=[tokens()])


def test_layers_without_positions_are_neither_rectified_nor_rotated():
    model = smollm3()
    report = replace_attention(model, **COARSE, calibration=[tokens()])
    assert [layer.far_positions for layer in report.replaced] == ["rectified", None]


def smollm3() -> SmolLM3ForCausalLM:
    """Two layers, the second without positions."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return SmolLM3ForCausalLM(SmolLM3Config(**sizes, num_hidden_layers=2, no_rope_layers=[1, 0])).eval()


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_scaled_rotations_scale_far_scores_like_near_ones(scale):
    """Some models scale cos and sin by s, and with them every score by s²."""
    angles = torch.rand(8, dtype=torch.float64).repeat(2)  # of one step, the same for both halves

    def rotation(positions):
        turned = positions.double()[:, None] * angles
        return scale * turned.cos().unsqueeze(0), scale * turned.sin().unsqueeze(0)

    positions, window = torch.arange(30), torch.tensor([6])
    rotary = ClampedRotary(apply_rotary_pos_emb, *(x[0, 0] for x in rotation(window)))
    q, k = torch.randn(2, 1, 3, 30, 16, dtype=torch.float64).unbind(0)
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *rotation(positions))
    assert rotary.detect_rotated_columns(turned_k, k, *rotation(positions)) and rotary.part == "all"
    far_q, far_k = rotary(turned_q, turned_k, *rotation(positions))
    clamped = apply_rotary_pos_emb(q, q, *rotation(window.expand(30)))[0]  # s R(W) q
    assert_close(far_q @ far_k.mT, scale * clamped @ k.mT, "far scores")
