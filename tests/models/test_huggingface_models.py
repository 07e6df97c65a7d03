"""The Hugging Face models: saving and loading, losses, generation in constant memory, training."""

import copy
import importlib
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from longvq_layers.layers import Codebook, DiagonalSSM, commitment_loss, optimizer_groups
from longvq_layers.models.huggingface import (
    LongVQCache,
    LongVQConfig,
    LongVQForCausalLM,
    LongVQForSequenceClassification,
    LongVQModel,
)
from longvq_layers.models.huggingface.cache_name import NAME
from tests.models.cases import SMALL, VOCABULARY, each_kind, each_streaming
from tests.tolerances import assert_close


def config(kind: str = "longvq", **options) -> LongVQConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    return LongVQConfig(**{**sizes, "block": kind, "block_options": SMALL[kind], "causal": True, **options})


def trained(kind: str = "longvq", kind_of_model=LongVQForCausalLM, **options):
    """A model in eval mode with trained codebooks, and embeddings so different that generation varies its tokens."""
    model = kind_of_model(config(kind, **options))
    for _ in range(2):
        model(torch.randint(VOCABULARY, (3, 40)))
    for name, parameter in model.named_parameters():
        if name.endswith("embedding.weight"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def prompts(batch: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their attention mask."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return torch.randint(1, VOCABULARY, (batch, length)), mask


def run(model, tokens, mask=None, **options):
    return model.generate(tokens, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)


# ---- configuration, saving, loading --------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    made = config("s4d", num_labels=5, pooling="last", pad_token_id=3, tie_word_embeddings=True, dropout=0.1)
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LongVQConfig
    assert {**again.to_dict(), "_name_or_path": ""} == {**made.to_dict(), "_name_or_path": ""}
    assert again.block_options == SMALL["s4d"] and again.num_labels == 5 and again.tie_word_embeddings


def test_importing_the_models_needs_no_transformers():
    code = (
        "import sys, longvq_layers.models; print('transformers' in sys.modules); sys.modules['transformers'] = None\n"
        "try:\n    import longvq_layers.models.huggingface\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\n") and "pip install longvq-layers[hf]" in done.stdout


def test_an_old_transformers_is_refused(monkeypatch):
    module = sys.modules["longvq_layers.models.huggingface"]
    monkeypatch.setattr("transformers.__version__", "4.57.0")
    with pytest.raises(
        ImportError, match=r"needs transformers 5 or later, got 4\.57\.0; pip install longvq-layers\[hf\]"
    ):
        importlib.reload(module)


@each_kind
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_bit_for_bit(kind, tied, tmp_path):
    model = trained(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LongVQForCausalLM and not loaded.training
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    for (name, first), (again, second) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == again and first.dtype == second.dtype and torch.equal(first, second), name
    tokens = torch.randint(VOCABULARY, (2, 20))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    for each in (model, loaded):  # a loaded codebook keeps learning, without a new k-means start
        torch.manual_seed(0)
        each.train()(tokens)
    for first, second in zip(model.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(first, second)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_ssms_and_codebooks(kind, dtype, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path)
    half = LongVQForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == half.lm_head.weight.dtype == dtype
    for (name, first), second in zip(model.state_dict().items(), half.state_dict().values(), strict=True):
        if ".codebook." in name or ".ssm." in name or ".ema." in name:
            assert second.dtype == first.dtype and torch.equal(first, second), name
    half.save_pretrained(tmp_path / "half")
    again = LongVQForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    for first, second in zip(half.state_dict().values(), again.state_dict().values(), strict=True):
        assert first.dtype == second.dtype and torch.equal(first, second)
    tokens = torch.randint(VOCABULARY, (2, 20))
    assert (
        torch.nn.functional.cosine_similarity(again(tokens).logits.float(), model(tokens).logits, dim=-1).min() > 0.98
    )
    assert run(again, tokens).shape == (2, 32)


@each_kind
@pytest.mark.parametrize("norm_type", ["layer", "rms", "scale", "batch"])
def test_missing_tensors_get_the_values_of_a_new_model(kind, norm_type, tmp_path):
    model = LongVQForCausalLM(config(kind, norm_type=norm_type))
    kept = "model.encoder.embedding.weight"
    model.save_pretrained(tmp_path, state_dict={kept: model.state_dict()[kept]})
    loaded, info = LongVQForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == len(model.state_dict()) - 1
    assert torch.equal(loaded.state_dict()[kept], model.state_dict()[kept])
    for (name, first), second in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert second.isfinite().all() if second.is_floating_point() else torch.equal(first, second), name
        if "norm" in name:
            assert torch.equal(first, second), name
        elif first.is_floating_point() and first.numel() > 4:
            assert 0.3 * first.abs().mean() <= second.abs().mean() <= 3 * first.abs().mean(), name
    for module, other in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(module, DiagonalSSM):
            assert torch.equal(module.log_A_real, other.log_A_real) and torch.equal(module.A_imag, other.A_imag)
        if isinstance(module, Codebook):
            assert not other._ready


def test_the_tensors_of_a_partial_checkpoint_are_kept(tmp_path):
    model = trained()
    state = model.state_dict()
    dropped = [name for name in state if name.endswith((".ssm.D", ".bias", ".codebook.idle"))]
    assert len(dropped) > 10
    model.save_pretrained(tmp_path, state_dict={name: x for name, x in state.items() if name not in dropped})
    loaded, info = LongVQForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]) or name in dropped, name
    assert all(book._ready for book in loaded.modules() if isinstance(book, Codebook))


def test_a_head_is_added_to_a_loaded_encoder(tmp_path):
    model = trained(kind_of_model=LongVQModel)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    assert type(classifier) is LongVQForSequenceClassification and classifier.score.out_features == 7
    assert 0 < classifier.score.weight.abs().max() <= 16**-0.5
    for first, second in zip(model.state_dict().values(), classifier.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    assert type(AutoModel.from_pretrained(tmp_path)) is LongVQModel


def test_a_layer_of_another_size_is_drawn_anew(tmp_path):
    model = trained(kind_of_model=LongVQForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    other = LongVQForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.score.weight.shape == (5, 16) and 0 < other.score.weight.abs().max() <= 16**-0.5
    assert 0 < other.score.bias.abs().max() <= 16**-0.5
    for first, second in zip(model.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(tied):
    model = trained(tie_word_embeddings=tied)
    tokens = torch.randint(VOCABULARY, (2, 9))
    before = model(tokens).logits
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model.config.vocab_size == model.model.encoder.num_inputs == VOCABULARY + 5
    after = model(tokens).logits
    assert after.shape == (2, 9, VOCABULARY + 5) and torch.equal(after[..., :VOCABULARY], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model(torch.full((1, 4), VOCABULARY + 4)).logits.isfinite().all()


# ---- forward and losses --------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_attention_mask_is_exact(kind, dtype):
    model = trained(kind, LongVQModel, causal=False).double()
    tokens, mask = prompts()
    y = model(tokens, attention_mask=mask.to(dtype)).last_hidden_state
    for row in range(3):
        kept = mask[row].bool()
        assert_close(y[row, kept], model(tokens[row : row + 1, kept]).last_hidden_state[0], f"row {row}")
        assert (y[row, ~kept] == 0).all()


def test_outputs():
    model = trained()
    tokens, mask = prompts()
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert getattr(output, NAME) is None and output.loss is None
    assert [h.shape for h in output.hidden_states] == [(3, 9, 16)] * 3
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, output.logits)
    assert torch.equal(model(tokens, mask, return_dict=False)[0], output.logits)
    assert torch.equal(model(tokens, mask, logits_to_keep=2).logits, output.logits[:, -2:])
    assert torch.equal(model(tokens, mask, logits_to_keep=torch.tensor([0, 5])).logits, output.logits[:, [0, 5]])


@each_kind
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_empty_and_short_inputs(kind, shape):
    model = trained(kind)
    tokens = torch.randint(VOCABULARY, shape)
    output = model(tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    assert output.logits.shape == (*shape, VOCABULARY) and output.loss == 0
    classifier = LongVQForSequenceClassification(config(kind, causal=False))
    assert classifier(tokens).logits.shape == (shape[0], 2)
    if kind != "transformer":
        with torch.no_grad():
            cache = getattr(model(tokens, use_cache=True), NAME)
        assert cache.batch_size == shape[0] and cache.get_seq_length() == shape[1]


def test_wrong_labels_are_named():
    model, tokens = LongVQForCausalLM(config("s4d")), torch.randint(VOCABULARY, (2, 9))
    with pytest.raises(ValueError, match=r"labels must have shape \(B, L\) = \(2, 9\), got \(2, 8\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(TypeError, match=r"labels must be int64, got torch\.int32"):
        model(tokens, labels=tokens.int())


@each_kind
def test_autocast(kind):
    model = LongVQForCausalLM(config(kind))
    tokens = torch.randint(VOCABULARY, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model.eval(), tokens).shape == (2, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_loss(tied):
    model = LongVQForCausalLM(config(tie_word_embeddings=tied, block_options={**SMALL["longvq"], "commitment": 0.5}))
    tokens = torch.randint(VOCABULARY, (3, 12))
    labels = tokens.clone()
    labels[0, 6:] = -100
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert commitment_loss(model) > 0.01
    assert_close(output.loss, expected + commitment_loss(model), "training loss")
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    parts = model(tokens, labels=labels, num_items_in_batch=torch.tensor(81))  # 27 labels of 81 in the step
    plain = torch.nn.functional.cross_entropy(parts.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(parts.loss, (plain + commitment_loss(model)) / 3, "share of a step")
    model.eval()
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, "eval loss")
    assert model(tokens, labels=torch.full_like(tokens, -100)).loss == 0


def test_packed_documents_have_the_loss_of_rows():
    model = trained()
    tokens, offsets = torch.randint(VOCABULARY, (1, 12)), torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = model(tokens, labels=tokens, cu_seqlens=offsets)
    parts = [model(part, labels=part).loss * (part.shape[1] - 1) for part in (tokens[:, :5], tokens[:, 5:])]
    assert_close(packed.loss, sum(parts) / 10, "loss")


@pytest.mark.parametrize("problem", ["single", "multi", "regression", "regressions"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classification_losses(problem, pooling):
    labels = {
        "single": torch.tensor([0, 3, 1]),
        "multi": torch.tensor([[0.0, 1, 1, 0]] * 3),
        "regression": torch.randn(3),
        "regressions": torch.randn(3, 4),
    }[problem]
    options = {"num_labels": 1 if problem == "regression" else 4, "pooling": pooling, "causal": False}
    if problem == "regressions":
        options["problem_type"] = "regression"
    model = LongVQForSequenceClassification(config(**options))
    tokens, mask = prompts()
    output = model(tokens, attention_mask=mask, labels=labels)
    functional = torch.nn.functional
    if problem == "single":
        expected = functional.cross_entropy(output.logits, labels)
    elif problem == "multi":
        expected = functional.binary_cross_entropy_with_logits(output.logits, labels)
    else:
        expected = functional.mse_loss(output.logits.squeeze(-1), labels)
    assert commitment_loss(model) > 0
    assert torch.equal(output.loss, expected + commitment_loss(model))
    output.loss.backward()
    model.eval()
    alone = model(tokens[1:2, 2:]).logits
    assert_close(model(tokens, attention_mask=mask).logits[1:2], alone, "logits")


@each_kind
def test_gradient_checkpointing_changes_nothing(kind):
    plain = LongVQForCausalLM(config(kind, dropout=0.2)).train()
    saving = copy.deepcopy(plain)
    with pytest.warns(FutureWarning, match="deprecated"):
        saving.gradient_checkpointing_enable()
    assert saving.model.encoder.backbone.gradient_checkpointing
    tokens = torch.randint(VOCABULARY, (3, 20))
    results = []
    for model in (plain, saving):
        for step in range(2):
            torch.manual_seed(step)
            model.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        results.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    calls = []
    hook = saving.model.encoder.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    saving(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2
    with pytest.warns(FutureWarning, match="deprecated"):
        saving.gradient_checkpointing_disable()
    saving(tokens, labels=tokens).loss.backward()
    assert len(calls) == 3
    hook.remove()


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"use_reentrant .*must be False, got True"):
        trained("s4d").activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("kind", [pytest.param("longvq", marks=pytest.mark.slow), "s4d"])  # compiling takes seconds
def test_compiled_equals_eager(kind):
    model = trained(kind)
    tokens, mask = prompts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask).logits, "logits")


# ---- generation ----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("padded", [True, False])
def test_generation_equals_running_everything(kind, padded):
    model = trained(kind)
    tokens, mask = prompts() if padded else (prompts()[0], None)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        {"do_sample": False, "prefill_chunk_size": 4} if kind != "transformer" else {"do_sample": False},
    ):
        torch.manual_seed(4)
        fast = run(model, tokens, mask, **options)
        torch.manual_seed(4)
        options.pop("prefill_chunk_size", None)
        slow = run(model, tokens, mask, **options, use_cache=False)
        assert torch.equal(fast, slow), options
        # One repeated token would prove little. Greedy search may still run into a short cycle.
        assert len(fast[:, 9:].unique()) > (4 if options["do_sample"] else 2)


@each_streaming
def test_generation_equals_a_loop_of_full_forwards(kind):
    """Greedy decoding by a full forward for every token and row, without transformers' loop."""
    model = trained(kind)
    tokens, mask = prompts()
    fast = run(model, tokens, mask, do_sample=False)
    for row in range(3):
        sequence = tokens[row : row + 1, mask[row].bool()]
        for _ in range(12):
            sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(fast[row, 9:], sequence[0, -12:])


@each_streaming
def test_the_cache_never_grows(kind):
    model = trained(kind)
    sizes = []
    for length, new in ((1, 2), (9, 12), (60, 40)):
        cache = LongVQCache()
        assert cache.nbytes == 0 and cache.batch_size == -1 and not cache.is_initialized
        tokens = torch.randint(1, VOCABULARY, (2, length))
        model.generate(tokens, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0)
        assert cache.get_seq_length() == length + new - 1 and cache.batch_size == 2 and len(cache) == 2
        assert cache.lengths.tolist() == [length + new - 1] * 2
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1 and sizes[0] > 0
    assert f"nbytes={sizes[0]}" in repr(cache)


@each_streaming
@pytest.mark.parametrize("padded", [True, False])
def test_several_turns_on_one_cache(kind, padded):
    model = trained(kind)
    tokens, mask = prompts()
    mask = mask if padded else torch.ones_like(mask)
    cache = LongVQCache()
    for turn in range(3):
        fast = run(model, tokens, mask, cache=cache, do_sample=False)
        slow = run(model, tokens, mask, use_cache=False, do_sample=False)
        assert torch.equal(fast, slow), turn
        tokens = torch.cat([fast, torch.randint(1, VOCABULARY, (3, 4))], 1)
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
    new = tokens[:, cache.get_seq_length() :]  # only the new tokens, with a mask for all
    whole = torch.cat([mask[:, :1] * 0, mask[:, 1:]], 1) if padded else mask
    if not padded:
        with pytest.raises(ValueError, match="input_ids must continue after the"):
            run(model, new, past_key_values=copy.deepcopy(cache), do_sample=False)
    elif not torch.equal(whole, mask):
        with pytest.raises(ValueError, match="attention_mask must agree with what the cache has read"):
            run(model, new, whole, past_key_values=copy.deepcopy(cache), do_sample=False)
    expected = run(model, tokens, mask, use_cache=False, do_sample=False)[:, -12:]
    assert torch.equal(run(model, new, mask, past_key_values=cache, do_sample=False)[:, -12:], expected)


@each_kind
def test_padding_between_tokens_changes_nothing(kind):
    model, tokens = trained(kind), torch.randint(VOCABULARY, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, 20:26] = mask[1, :3] = mask[1, 30:31] = 0
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, output_hidden_states=True)
        for row in range(2):
            real = mask[row].bool()
            alone = model(tokens[row : row + 1, real], output_hidden_states=True)
            assert_close(whole.logits[row, real], alone.logits[0], f"row {row}")
            for state, expected in zip(whole.hidden_states, alone.hidden_states, strict=True):
                assert_close(state[row, real], expected[0], f"hidden of row {row}")
        if kind != "transformer":
            cached = model(tokens, attention_mask=mask, use_cache=True).logits
            assert_close(cached[mask.bool()], whole.logits[mask.bool()], "with a cache")


def test_one_prompt_continued_in_several_ways():
    model = trained()
    prompt = torch.randint(1, VOCABULARY, (1, 20))  # no 0, which transformers takes for padding if there is no mask
    cache = LongVQCache()
    with torch.no_grad():
        model(prompt, cache=cache)
    for _ in range(2):
        tokens = torch.cat([prompt, torch.randint(1, VOCABULARY, (1, 3))], 1)
        fast = run(model, tokens, past_key_values=copy.deepcopy(cache), do_sample=False)
        assert torch.equal(fast, run(model, tokens, use_cache=False, do_sample=False))
    cache.batch_repeat_interleave(4)
    tokens = torch.cat([prompt.expand(4, -1), torch.randint(1, VOCABULARY, (4, 3))], 1)
    fast = run(model, tokens, past_key_values=cache, do_sample=False)
    assert torch.equal(fast, run(model, tokens, use_cache=False, do_sample=False))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


def test_generation_from_embeddings():
    model = trained()
    tokens, mask = prompts()
    embeds = model.get_input_embeddings()(tokens)
    fast = run(model, None, mask, inputs_embeds=embeds, do_sample=False)
    assert torch.equal(fast, run(model, tokens, mask, do_sample=False)[:, 9:])
    with pytest.raises(NotImplementedError, match="inputs_embeds must be None without a cache"):
        run(trained("transformer"), None, mask, inputs_embeds=embeds, do_sample=False)


def test_rows_that_end_early():
    model = trained()
    tokens, mask = prompts()
    eos = int(run(model, tokens, mask, do_sample=False)[0, 12])
    for options in ({}, {"num_beams": 2}):
        fast = run(model, tokens, mask, do_sample=False, eos_token_id=eos, **options)
        assert torch.equal(
            fast, run(model, tokens, mask, do_sample=False, eos_token_id=eos, use_cache=False, **options)
        )


def test_forward_with_a_cache_equals_forward():
    model = trained().double()
    tokens, mask = prompts()
    whole = model(tokens, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        cache, parts = None, []
        for part, columns in ((slice(0, 4), 4), (slice(4, 5), 5), (slice(5, 9), 9)):
            output = model(
                tokens[:, part],
                attention_mask=mask[:, :columns],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            cache = getattr(output, NAME)
            parts.append(output)
    assert isinstance(cache, LongVQCache) and cache.lengths.tolist() == mask.sum(1).tolist()
    real = mask.bool()
    assert_close(torch.cat([p.logits for p in parts], 1)[real], whole.logits[real], "logits")
    for layer in range(3):
        hidden = torch.cat([p.hidden_states[layer] for p in parts], 1)
        assert_close(hidden[real], whole.hidden_states[layer][real], f"hidden states {layer}")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("transformer", None), ("longvq", {**SMALL["longvq"], "num_codes": None})],
)
def test_blocks_without_a_constant_state_generate_without_a_cache(kind, options):
    model = trained(kind, block_options=options or SMALL[kind])
    tokens, mask = prompts()
    output = run(model, tokens, mask, do_sample=False, return_dict_in_generate=True)
    assert getattr(output, NAME) is None and not model.model.streams()
    sequence = tokens[1:2, 2:]
    for _ in range(12):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(output.sequences[1, 9:], sequence[0, -12:])
    with pytest.raises(NotImplementedError, match="state"), torch.no_grad():
        model(tokens, use_cache=True)


def test_what_generation_refuses():
    model, tokens = trained(), torch.randint(VOCABULARY, (1, 9))
    with pytest.raises(RuntimeError, match=r"generate: .* must be in eval mode, got training mode; call eval\(\)"):
        run(copy.deepcopy(model).train(), tokens)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            run(model, tokens, **options)
    with pytest.raises(ValueError, match="Contrastive Search requires"):
        run(model, tokens, penalty_alpha=0.5, top_k=4)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        run(model, tokens, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="can't be an assistant"):
        run(model, tokens, is_assistant=True)
    with pytest.raises(TypeError, match="cache must be a LongVQCache, got DynamicCache"):
        run(model, tokens, past_key_values=DynamicCache())
    cache = LongVQCache()
    run(model, tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"input_ids must continue after the 20 positions in the cache, got 9"):
        run(model, tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"cache must have the 2 rows of the input, got 1"):
        model(tokens.expand(2, -1), past_key_values=cache)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=r"give either cache or past_key_values, two names of one argument"):
            call(tokens, past_key_values=cache, cache=cache)
    for call in (lambda: cache.crop(-1), cache.activate_past_recording):
        with pytest.raises(NotImplementedError, match="can't be taken back"):
            call()
    with pytest.raises(NotImplementedError, match="states, not keys and values"):
        cache.update(tokens, tokens, 0)


def test_wrong_inputs_are_named():
    model, tokens = trained(), torch.randint(VOCABULARY, (2, 9))
    cases = [
        ({}, ValueError, "give either input_ids or inputs_embeds, got none"),
        ({"input_ids": tokens, "inputs_embeds": torch.zeros(2, 9, 16)}, ValueError, "inputs_embeds, got both"),
        ({"input_ids": tokens.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": tokens[0]}, ValueError, "input_ids must have 2 dimensions"),
        ({"inputs_embeds": tokens}, ValueError, "inputs_embeds must have 3 dimensions"),
        ({"input_ids": tokens, "output_attentions": True}, NotImplementedError, "attention weights are never formed"),
        ({"input_ids": tokens, "attention_mask": tokens[:, 1:]}, ValueError, "(B, L) = (2, 9), got (2, 8)"),
        ({"input_ids": tokens, "attention_mask": tokens[:, None, None]}, ValueError, "attention_mask must have 2 dim"),
        ({"input_ids": tokens, "position_ids": tokens}, TypeError, "position_ids"),
        ({"input_ids": tokens, "past_key_values": LongVQCache(), "use_cache": False}, ValueError, "use_cache must not"),
        ({"input_ids": tokens, "labels": tokens, "logits_to_keep": 1}, ValueError, "logits_to_keep must be 0"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            model(**options)
    with pytest.raises(RuntimeError, match=r"with a cache the model must be in eval mode.*call eval\(\)"):
        model.train()(tokens, use_cache=True)
    with pytest.raises(ValueError, match=r"config.causal must be True, got False"):
        LongVQForCausalLM(config(causal=False))
    with pytest.raises(ValueError, match="pooling must be"):
        LongVQForSequenceClassification(config(pooling="max"))


# ---- training ------------------------------------------------------------------------------------------------------


class Copies(torch.utils.data.Dataset):
    """Sequences of one repeated token, which a model learns in a few steps."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        tokens = torch.full((12,), index % VOCABULARY)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_trainer(tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    model = LongVQForCausalLM(config())
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=15,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        logging_steps=5,
        save_steps=40,
        eval_strategy="steps",
        eval_steps=40,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2, weight_decay=0.01))
    trainer = Trainer(model, settings, train_dataset=Copies(300), eval_dataset=Copies(30), optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < 0.5 * losses[0] and evals[-1] < 0.5 * losses[0]
    books = [module for module in model.modules() if isinstance(module, Codebook)]
    assert all(bool(book.initialized) and book.steps == 80 for book in books)  # two forwards a step, each learned once
    loaded = LongVQForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    for first, second in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(first, second)
