"""Caches of replaced models: generation gives the tokens of the full forward, with a cache of constant size."""

import copy
import threading

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
)

from longvq_layers.models.huggingface.cache_name import NAME
from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.adapters.huggingface.cache import VQCacheLayer
from tests.replace.adapters.huggingface.unusual_models import diffllama, gemma3n
from tests.replace.models import COARSE, gpt2, llama, output, tokens
from tests.tolerances import assert_close

KINDS = {
    "gpt2": (gpt2, {}),
    "rectified": (llama, {"far_positions": "rectified"}),
    "limited": (llama, {"trained_length": 12}),
    "rotated": (llama, {"far_positions": "rotated"}),
    "no window": (llama, {"window": 0}),
    "plain": (llama, {"variance_correction": False}),
}


def replaced(kind="rectified", **options):
    build, own = KINDS[kind]
    model = build()
    replace_attention(model, **{"num_codes": 8, "window": 5, "calibration": [tokens(4, 60)], **own, **options})
    return model


def full_forward(model, ids, mask=None):
    """Logits of the next token, without any cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return output(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[:, -1]


def greedy(model, ids, mask, steps):
    for _ in range(steps):
        ids = torch.cat([ids, full_forward(model, ids, mask).argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def left_padded(batch=3, length=23):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return tokens(batch, length) * mask, mask


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_left_padding(kind):
    model, (ids, mask) = replaced(kind), left_padded()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found, greedy(model, ids, mask, 12))


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_beams_and_sampling(kind):
    model, (ids, mask) = replaced(kind), left_padded()
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2, "top_k": 5}):
        sequences = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            sequences.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=9, use_cache=use_cache, eos_token_id=None, **options
                )
            )
        assert torch.equal(*sequences)


@pytest.mark.parametrize("kind", ["gpt2", "rectified", "limited", "rotated"])
@pytest.mark.parametrize("cuts", [(20,), (1, 2, 3), (7, 40), (30, 31, 59)])
def test_any_pieces_are_the_whole(kind, cuts):
    model, ids = replaced(kind), tokens(2, 60)
    whole, cache, pieces = output(model, ids, use_cache=False), DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in ids.tensor_split(cuts, dim=1):
            pieces.append(model(piece, **{NAME: cache}, use_cache=True).logits)
    assert_close(torch.cat(pieces, 1), whole, f"pieces of {kind}")
    assert cache.get_seq_length() == 60 and all(type(layer) is VQCacheLayer for layer in cache.layers)


def test_several_turns_on_one_cache():
    model, cache, ids = replaced(), DynamicCache(), tokens(1, 20)
    for turn in range(3):
        asked = ids
        ids = model.generate(ids, **{NAME: cache}, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(ids, greedy(model, asked, torch.ones_like(asked), 6)), turn
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat([ids, tokens(1, 9, seed=turn)], dim=1)


@pytest.mark.parametrize("kind", ["gpt2", "rectified", "rotated", "no window"])
def test_several_turns_of_a_batch_have_padding_in_the_middle(kind):
    model, cache, (ids, mask) = replaced(kind), DynamicCache(), left_padded()
    options = {NAME: cache, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    for turn in range(3):
        asked = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(asked, greedy(model, ids, mask, 7)), turn
        answer = torch.ones(3, 7, dtype=torch.long)
        more, hidden = left_padded(3, 11 + turn)
        ids, mask = torch.cat([asked, more], dim=1), torch.cat([mask, answer, hidden], dim=1)


@pytest.mark.parametrize("kind", ["gpt2", "rectified", "rotated"])
def test_gaps_are_as_if_they_were_not_there(kind):
    model, ids = replaced(kind), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 20:26] = mask[1, :3] = mask[1, 30:31] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    whole = output(model, ids, use_cache=False, **inputs)
    assert torch.equal(output(model, ids, **inputs)[mask.bool()], whole[mask.bool()])
    for row in range(2):
        real = mask[row].bool()
        assert_close(whole[row, real], output(model, ids[row : row + 1, real], use_cache=False)[0], f"row {row}")
    loss = model(ids, labels=ids.masked_fill(mask == 0, -100), use_cache=False, **inputs).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_the_first_token_alone_of_an_eager_model(kind):
    model, ids = KINDS[kind][0](), tokens(2, 20)
    model.set_attn_implementation("eager")
    replace_attention(
        model, num_codes=8, window=5, calibration=[tokens(4, 60)], filter_fn=lambda m, name: ".1." in name
    )
    whole, cache = output(model, ids, use_cache=False), DynamicCache(config=model.config)
    with torch.no_grad():  # transformers makes no mask for one token
        pieces = [model(piece, **{NAME: cache}).logits for piece in (ids[:, :1], ids[:, 1:2], ids[:, 2:])]
    assert_close(torch.cat(pieces, 1), whole, "pieces")


def test_rows_of_a_cache_take_their_padding_along():
    model, (ids, mask) = replaced(), left_padded()
    cache, rows = DynamicCache(config=model.config), torch.tensor([2, 2, 0])
    more = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{NAME: cache})
        cache.batch_select_indices(rows)
        with pytest.raises(NotImplementedError, match="each where it was"):
            model(ids[:, :1], attention_mask=more, **{NAME: cache})
        model(ids[:, :1], attention_mask=more[rows], **{NAME: cache})
    assert [layer.positions for layer in cache.layers] == [24, 24]  # the call that raised added nothing


def test_without_padding_nothing_is_kept_of_it():
    model, cache = replaced(), DynamicCache()
    with torch.no_grad():
        for _ in range(3):
            model(tokens(2, 20), **{NAME: cache})
    assert all(layer.hidden is None and layer.next_hidden is None for layer in cache.layers)


def all_visible(shape, dtype):
    return torch.zeros(shape) if dtype is torch.float else torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 30), (2, 1, 30, 30), (1, 1, 30, 30)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float])
def test_a_bidirectional_call_is_what_it_is_with_a_cache_too(attention, shape, dtype):
    """Decoders that make embeddings are called like this; no later call can continue from it."""
    ids, mask = tokens(2, 30), all_visible(shape, dtype)
    for build, positions in ((gpt2, "auto"), (llama, "rotated")):
        model = build()
        model.set_attn_implementation(attention)
        expected = output(model, ids, attention_mask=mask)
        replace_attention(model, num_codes=128, window=40, calibration=[ids], far_positions=positions)
        for use_cache in (True, False):
            found = output(model, ids, attention_mask=mask, use_cache=use_cache)
            assert_close(found, expected, f"{build.__name__}, cache {use_cache}")
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, attention_mask=mask, **{NAME: cache})
            with pytest.raises(NotImplementedError, match="got one that was filled by a bidirectional call"):
                model(ids[:, :1], **{NAME: cache})
            cache.reset()
            model(ids, **{NAME: cache})


def test_a_copy_of_the_cache_goes_its_own_way():
    model, cache = replaced(), DynamicCache()
    with torch.no_grad():
        model(tokens(1, 30), **{NAME: cache})
        branch = copy.deepcopy(cache)
        first = model(tokens(1, 5, seed=1), **{NAME: cache}).logits
        assert torch.equal(model(tokens(1, 5, seed=1), **{NAME: branch}).logits, first)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(tokens(1, 30), **{NAME: cache}).logits, output(model, tokens(1, 30)), "after reset")


def test_the_cache_does_not_grow():
    model, sizes = replaced(), []
    cache = DynamicCache()
    with torch.no_grad():
        for _ in range(3):
            model(tokens(2, 200), **{NAME: cache})
            sizes.append(sum(layer.nbytes for layer in cache.layers))
    assert sizes[0] == sizes[1] == sizes[2] > 0
    state = cache.layers[0].state.past
    assert state.far_sums.shape[2] == 8 and state.ring_values.shape[2] == 4


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_assisted_decoding_is_refused(kind):
    model, helper = replaced(kind), KINDS[kind][0]()
    with pytest.raises((NotImplementedError, ValueError), match=r"assist|crop"):
        model.generate(tokens(1, 9), assistant_model=helper, max_new_tokens=9, do_sample=False, eos_token_id=None)
    with pytest.raises(NotImplementedError, match="crop"):
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens(1, 9), **{NAME: cache})
        cache.layers[0].crop(3)


def test_a_cache_of_another_time_is_not_used_silently():
    model, ids, cache = replaced(), tokens(1, 30), DynamicCache()
    with torch.no_grad():
        model(ids, **{NAME: cache})
        restore_attention(model)
        with pytest.raises(RuntimeError, match="start with a new cache"):
            model(ids, **{NAME: cache})
    second = replaced()
    with torch.no_grad(), pytest.raises(RuntimeError, match="another replaced attention"):
        second(ids, **{NAME: cache})


def test_a_cache_that_was_filled_before_the_replacement():
    model, ids, cache = gpt2(), tokens(1, 60), DynamicCache()
    with torch.no_grad():
        model(ids[:, :40], **{NAME: cache})
        replace_attention(model, num_codes=96, window=5, calibration=[ids])
        second = model(ids[:, 40:], **{NAME: cache}).logits  # the cache holds all keys, so this is exact
    assert_close(second, output(model, ids)[:, 40:], "filled before")


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_gradients_with_a_cache(kind):
    """Many models make a cache in training too; it must not cut the gradient of the parameters."""
    model, ids = replaced(kind), tokens()
    expected = model(ids, labels=ids, use_cache=False).loss
    loss = model(ids, labels=ids, use_cache=True).loss
    assert_close(loss, expected, "loss")
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_encoder_and_decoder():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 101, "init_std": 0.3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, **heads, pad_token_id=0, forced_eos_token_id=None)
    model = BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens(2, 30), "decoder_input_ids": tokens(2, 25, seed=1)}
    report = replace_attention(model, num_codes=8, window=4, calibration=[inputs], strict=False)
    assert len(report.replaced) == 3 and all("cross-attention" in layer.skipped for layer in report.skipped)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    cached = model.generate(inputs["input_ids"], **options)
    assert torch.equal(cached, model.generate(inputs["input_ids"], use_cache=False, **options))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(**inputs, **{NAME: cache})
    assert all(type(layer) is VQCacheLayer for layer in cache.self_attention_cache.layers)


def test_layers_that_keep_their_attention_keep_their_cache():
    model = replaced(filter_fn=lambda module, name: ".1." in name)
    ids, cache = tokens(2, 40), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, **{NAME: cache}).logits for piece in ids.split(13, dim=1)]
    assert_close(torch.cat(pieces, 1), output(model, ids, use_cache=False), "partial")
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "VQCacheLayer"]


def test_threads_that_share_a_model_do_not_share_caches():
    model, prompts = replaced(), [tokens(1, 20, seed=seed) for seed in range(4)]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(prompt, **options) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}

    def generate(number):
        found[number] = model.generate(prompts[number], **options)

    for _ in range(3):
        workers = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(torch.equal(found[number], expected[number]) for number in range(4))


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_gradients_of_inputs_flow_where_the_model_is_frozen(kind):
    model = replaced(kind).requires_grad_(False)
    embeddings = model.get_input_embeddings()(tokens(2, 20)).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["gpt2", "rectified"])
def test_a_mask_that_hides_the_past_later_is_refused(kind):
    model, (ids, mask) = replaced(kind), left_padded()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{NAME: cache})
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        model(ids[:, :1], attention_mask=longer, **{NAME: cache})
        longer = torch.cat([longer, torch.ones_like(mask[:, :1])], dim=1)
        for hidden, said in ((longer.clone(), r"\[20, "), (longer.clone(), r"\[24, 21, "), (None, "all tokens")):
            if said == r"\[20, ":
                hidden[0, 5:9] = 0
            elif hidden is not None:  # as many hidden tokens, but another one
                hidden[1, 0], hidden[1, 7] = 1, 0
            with pytest.raises(
                NotImplementedError, match=rf"attention_mask must show the .*, got {said}.*can't hide or show one later"
            ):
                model(ids[:, :1], attention_mask=hidden, **{NAME: cache})


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


def test_a_cache_of_sums_has_no_keys_to_look_at():
    model, cache = gpt2(), DynamicCache()
    replace_attention(model, **COARSE, calibration=[tokens()])
    output(model, tokens(), **{NAME: cache}, use_cache=True)
    for name in ("keys", "values"):
        with pytest.raises(NotImplementedError, match="looks for keys in its cache"):
            getattr(cache.layers[0], name)
