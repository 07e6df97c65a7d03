"""attn_implementation="longvq": a model that is made with it, then trained, saved and loaded."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BartConfig, BertConfig, GPT2Config, LlamaConfig, T5Config

from longvq_layers import commitment_loss
from longvq_layers.replace import load_replaced, register_attn_implementation, replace_attention
from tests.replace.models import TOKENS, VOCABULARY, output, padded, tokens
from tests.tolerances import assert_close

OPTIONS = {"num_codes": 8, "window": 5}
GPT2 = GPT2Config(n_embd=36, n_head=3, n_layer=2, vocab_size=VOCABULARY, initializer_range=0.3, **TOKENS)
LLAMA = LlamaConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    num_hidden_layers=2,
    vocab_size=VOCABULARY,
    initializer_range=0.3,
    **TOKENS,
)


@pytest.fixture(autouse=True)
def registered():
    register_attn_implementation()


def made(config, **options):
    config = type(config)(**{**config.to_dict(), "longvq": options or OPTIONS})
    return AutoModelForCausalLM.from_config(config, attn_implementation="longvq").train()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_learns_stays_causal_and_generates(config, tmp_path):
    model, ids = made(config), tokens(4, 60)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        (loss + commitment_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    slot = next(m for m in model.modules() if type(m).__name__ == "SwappedAttention")
    assert (slot.num_codes, slot.window) == (8, 5) and slot.codebook.initialized
    before, changed = output(model, ids), ids.clone()
    changed[:, 40:] = tokens(4, 60, seed=1)[:, 40:]
    assert torch.equal(output(model, changed)[:, :40], before[:, :40])
    assert not torch.equal(output(model, changed)[:, 40:], before[:, 40:])
    generated = model.generate(ids[:, :20], max_new_tokens=8, do_sample=False, eos_token_id=None)
    longer = ids[:, :20]
    for _ in range(8):
        longer = torch.cat([longer, output(model, longer, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, longer)

    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longvq").eval()
    assert fresh.config.longvq == OPTIONS
    with pytest.raises(RuntimeError, match="has no codes; call"):
        fresh(ids)
    load_replaced(fresh, tmp_path)
    assert torch.equal(output(fresh, ids), before)


def test_a_trained_model_is_calibrated_like_any_other():
    plain = AutoModel.from_config(GPT2).eval()
    named = AutoModel.from_config(GPT2, attn_implementation="longvq").eval()
    named.load_state_dict(plain.state_dict())
    inputs = padded("right")
    for model in (plain, named):
        replace_attention(model, **OPTIONS, calibration=[inputs])
    assert_close(output(named, **inputs), output(plain, **inputs), "by name")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes": 3}, ValueError, "config.longvq must hold some of num_codes, .*got 'codes'"),
        ({"far_positions": "rectified"}, ValueError, "config.longvq must hold some of .*, got 'far_positions'"),
        ({"num_codes": 0}, ValueError, "num_codes"),
        ({"window": -1}, ValueError, "window"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        made(GPT2, **options)(tokens())


def test_what_codes_cannot_do_is_refused_here_too():
    config = GPT2Config(**{**GPT2.to_dict(), "longvq": "fast"})
    with pytest.raises(TypeError, match=r"config\.longvq must be a dict of options, got str"):
        AutoModel.from_config(config, attn_implementation="longvq").train()(tokens())
    bert = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=1, vocab_size=101)
    bert.is_decoder = bert.add_cross_attention = True
    model = AutoModel.from_config(bert, attn_implementation="longvq").train()
    with pytest.raises(NotImplementedError, match="cross-attention"):
        model(tokens(), encoder_hidden_states=torch.randn(2, 9, 32))
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 1, "vocab_size": 101}
    t5 = AutoModel.from_config(T5Config(**sizes, decoder_start_token_id=0), attn_implementation="longvq").train()
    with pytest.raises(NotImplementedError, match="position"):
        t5(tokens(), decoder_input_ids=tokens())
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
    bart = BartConfig(d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=101, **sizes)
    bart = AutoModel.from_config(bart, attn_implementation="longvq").train()
    with pytest.raises(NotImplementedError, match=r"may come from an encoder; use replace_attention"):
        bart(tokens(), decoder_input_ids=tokens())  # equal lengths, so that the numbers of keys and queries don't tell
