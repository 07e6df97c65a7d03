"""The plain models: every kind of block in a stack, masks, checkpointing, steps, heads."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers.layers import Codebook, commitment_loss
from longvq_layers.models import (
    S4DBlock,
    SequenceClassifier,
    SequenceEncoder,
    SequenceLM,
    TransformerBlock,
)
from longvq_layers.models.sequence import pool
from tests.models.cases import SMALL, VOCABULARY, WIDTH, each_kind, each_streaming
from tests.tolerances import assert_close


def encoder(kind: str, **options) -> SequenceEncoder:
    options = {"num_inputs": VOCABULARY, "d_model": WIDTH, "depth": 2, "block_options": SMALL[kind], **options}
    return SequenceEncoder(block=kind, **options)


def trained(kind: str, **options) -> SequenceEncoder:
    """An encoder in eval mode with trained codebooks."""
    model = encoder(kind, **options)
    for _ in range(2):
        model(torch.randint(VOCABULARY, (3, 30)))
    return model.eval()


@each_kind
@pytest.mark.parametrize("shape", [(2, 9), (0, 5), (2, 0), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_shapes_of_tokens_and_vectors(kind, shape, causal):
    model = encoder(kind, causal=causal)
    tokens = torch.randint(VOCABULARY, shape)
    assert model(tokens).shape == (*shape, WIDTH)
    assert SequenceClassifier(model, 3)(tokens).shape == (shape[0], 3)
    assert SequenceLM(model, 7)(tokens.int()).shape == (*shape, 7)
    vectors = encoder(kind, num_inputs=None, input_dim=5, causal=causal)
    y = vectors(torch.randn(*shape, 5))
    assert y.shape == (*shape, WIDTH) and y.isfinite().all()
    y.sum().backward()


@each_kind
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_change_nothing(kind, causal, side):
    model = trained(kind, causal=causal, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (11,))
    alone = model(tokens.unsqueeze(0))[0]
    batch, mask = torch.randint(VOCABULARY, (3, 17)), torch.ones(3, 17, dtype=torch.bool)
    at = slice(6, 17) if side == "left" else slice(0, 11)
    batch[1, at], mask[1, at] = tokens, False
    mask[0, 2:5] = False  # the last row has only padding
    y = model(batch, mask)
    assert_close(y[1, at], alone, "padded output")
    assert (y[mask] == 0).all() and y.isfinite().all()
    for pooling in ("mean", "last"):
        classifier = SequenceClassifier(model, 4, pooling=pooling)
        expected = alone.mean(0) if pooling == "mean" else alone[-1]
        assert_close(classifier(batch, mask)[1], classifier.head(expected), pooling)


@each_kind
def test_masked_inputs_may_be_anything(kind):
    model = encoder(kind, num_inputs=None, input_dim=5).eval()
    x, mask = torch.randn(2, 12, 5), torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 7:] = mask[1, :3] = True
    results = []
    for value in (0.0, torch.nan):
        model.zero_grad()
        leaf = x.masked_fill(mask.unsqueeze(-1), value).requires_grad_()
        y = model(leaf, mask)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for first, second in zip(*results, strict=True):
        assert second.isfinite().all() and torch.equal(first, second)


@each_kind
def test_causal_models_never_see_the_future(kind):
    model = trained(kind, causal=True, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (1, 14))
    changed = tokens.clone()
    changed[:, 8] = (tokens[:, 8] + 1) % VOCABULARY
    difference = (model(changed) - model(tokens)).abs().sum((0, 2))
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()
    both = trained(kind, dtype=torch.float64)
    assert ((both(changed) - both(tokens)).abs().sum((0, 2)) > 0).any(0)


@each_kind
def test_packed_documents_equal_rows(kind):
    model = trained(kind, dtype=torch.float64, causal=True)
    tokens, offsets = torch.randint(VOCABULARY, (1, 12)), torch.tensor([0, 5, 12], dtype=torch.int32)
    if kind == "transformer":
        with pytest.raises(TypeError, match="cu_seqlens"):
            model(tokens, cu_seqlens=offsets)
        return
    packed = model(tokens, cu_seqlens=offsets)
    assert_close(packed[:, :5], model(tokens[:, :5]), "first document")
    assert_close(packed[:, 5:], model(tokens[:, 5:]), "second document")


@each_kind
def test_gradient_checkpointing_changes_nothing(kind):
    plain = encoder(kind, dropout=0.3).train()
    saving = copy.deepcopy(plain)
    saving.backbone.gradient_checkpointing = True
    tokens, mask = torch.randint(VOCABULARY, (3, 20)), torch.zeros(3, 20, dtype=torch.bool)
    mask[0, 15:] = True
    for step in range(3):  # the first step fits the codebooks, the others update them
        results = []
        for model in (plain, saving):
            torch.manual_seed(step)
            model.zero_grad()
            loss = model(tokens, mask).square().mean() + 100 * commitment_loss(model)
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second), step


def test_gradient_checkpointing_runs_blocks_again():
    model = encoder("s4d", depth=3)
    model.backbone.gradient_checkpointing = True
    calls = []
    for block in model.backbone.blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randint(VOCABULARY, (1, 5))).sum().backward()
    assert len(calls) == 6
    calls.clear()
    model.eval()(torch.randint(VOCABULARY, (1, 5))).sum().backward()
    assert len(calls) == 3


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("masked", [False, True])
@each_streaming
def test_pieces_equal_forward(kind, masked, data):
    """Masked tokens take no position: each row equals `forward` of its unmasked tokens alone."""
    torch.manual_seed(2)
    model, rows = trained(kind, causal=True, dtype=torch.float64), data.draw(st.integers(0, 3))
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 2), st.integers(0, 9)), max_size=5))
    tokens = torch.randint(VOCABULARY, (rows, sum(sizes)))
    mask = torch.rand(tokens.shape) < data.draw(st.sampled_from([0.2, 0.7, 1.0])) if masked else None
    parts = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    with torch.no_grad():
        state, outputs = model.initial_state(rows), [torch.zeros(rows, 0, WIDTH, dtype=torch.float64)]
        memory = state.nbytes
        for part, own in zip(tokens.split(sizes, 1), parts, strict=True):
            if part.shape[1] == 1 and data.draw(st.booleans()):
                y, state = model.step(part[:, 0], state, None if own is None else own[:, 0])
                y = y.unsqueeze(1)
            else:
                y, state = model.step(part, state, own)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        assert state.nbytes == memory
        if mask is None:
            assert_close(y, model(tokens), "y")
            return
        assert (y[mask] == 0).all()
        for row in range(rows):
            kept = ~mask[row]
            assert_close(y[row, kept], model(tokens[row : row + 1, kept])[0], f"row {row}")


@each_streaming
def test_states_are_cloned_and_rows_selected(kind):
    model = SequenceLM(trained(kind, causal=True, dtype=torch.float64), 7).double().eval()
    tokens = torch.randint(VOCABULARY, (3, 10))
    rows = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        _, state = model.step(tokens[:, :6], model.initial_state(3))
        kept, chosen = state.clone(), state.index_select(rows)
        first, _ = model.step(tokens[:, 6:], state)
        second, _ = model.step(tokens[:, 6:], kept)
        third, _ = model.step(tokens[rows, 6:], chosen)
    assert_close(first, model(tokens)[:, 6:], "first")
    assert torch.equal(first, second)
    assert_close(third, model(tokens)[rows, 6:], "chosen rows")


def test_the_state_of_s4d_is_checked():
    block = S4DBlock(WIDTH, causal=True).eval()
    state = block.initial_state(2)
    with pytest.raises(RuntimeError, match=r"S4DBlock\.step: .*training mode.*eval\(\)"):
        copy.deepcopy(block).train().step(torch.randn(2, WIDTH), state)
    with pytest.raises(NotImplementedError, match=r"S4DBlock\.step: causal must be True.*bidirectional"):
        S4DBlock(WIDTH).eval().step(torch.randn(2, WIDTH), state)
    with pytest.raises(NotImplementedError, match=r"S4DBlock\.initial_state: causal must be True.*bidirectional"):
        S4DBlock(WIDTH).initial_state(2)
    with pytest.raises(TypeError, match="state must be of type S4DState, from initial_state, got Tensor"):
        block.step(torch.randn(2, WIDTH), state.memory)
    with pytest.raises(ValueError, match="x must have the B = 2 of the state, got 3"):
        block.step(torch.randn(3, WIDTH), state)
    with pytest.raises(TypeError, match=r"rows must be int64 or int32, got torch\.float32"):
        state.index_select(torch.tensor([0.0]))


def test_steps_of_s4d_differentiate():
    block = S4DBlock(WIDTH, causal=True).eval().double()
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    state, outputs = block.initial_state(2), []
    for part in x.split([2, 1, 3], 1):
        y, state = block.step(part, state)
        outputs.append(y)
    grad = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), x)[0]
    assert_close(grad, torch.autograd.grad(block(x).square().sum(), x)[0], "gradient")


def test_blocks_that_cannot_stream_say_so():
    with pytest.raises(NotImplementedError, match="'transformer', whose blocks have no state of constant size"):
        encoder("transformer", causal=True).initial_state(1)
    with pytest.raises(NotImplementedError, match="bidirectional"):
        encoder("longvq").initial_state(1)
    model = encoder("longvq", causal=True)
    with pytest.raises(RuntimeError, match=r"training mode.*eval\(\)"), torch.no_grad():
        model.step(torch.zeros(1, 3, dtype=torch.long), model.initial_state(1))


@each_kind
@pytest.mark.parametrize("norm_type", ["rms", "scale", "batch"])
def test_norm_types_reach_every_norm(kind, norm_type):
    model = encoder(kind, norm_type=norm_type)
    kinds = {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__}
    assert kinds == {{"rms": "RMSNorm", "scale": "ScaleNorm", "batch": "BatchNorm"}[norm_type]}
    model(torch.randint(VOCABULARY, (2, 9))).sum().backward()


@each_kind
def test_half_precision_keeps_codebooks_and_ssms_in_float32(kind):
    model = trained(kind).bfloat16()
    y = model(torch.randint(VOCABULARY, (2, 20)))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    kept = [x for name, x in model.state_dict().items() if ".codebook." in name or ".ssm." in name or ".ema." in name]
    assert all(x.dtype != torch.bfloat16 for x in kept) and (kept or kind == "transformer")


def test_hidden_states_are_collected():
    model = trained("longvq", causal=True)
    x = model.embedding(torch.randint(VOCABULARY, (2, 9)))
    hidden, streamed = [], []
    y = model.backbone(x, hidden=hidden)
    with torch.no_grad():
        model.backbone.step(x, model.initial_state(2), hidden=streamed)
    assert torch.equal(hidden[0], x) and len(hidden) == len(streamed) == 2
    assert_close(model.backbone.norm(model.backbone.blocks[1](hidden[1])), y, "last")
    assert_close(streamed[1], hidden[1], "streamed")


def test_pool():
    hidden = torch.tensor([[[1.0], [2.0], [6.0]], [[0.0], [4.0], [0.0]], [[0.0], [0.0], [0.0]]])
    mask = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])
    assert pool(hidden, mask, "mean").flatten().tolist() == [3, 4, 0]
    assert pool(hidden, mask, "last").flatten().tolist() == [6, 4, 0]
    assert pool(hidden, None, "last").flatten().tolist() == [6, 0, 0]
    assert pool(hidden[:, :0], None, "last").flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_inputs": None}, ValueError, "give num_inputs for tokens or input_dim for vectors"),
        ({"input_dim": 3}, ValueError, "give num_inputs for tokens or input_dim"),
        ({"num_inputs": 0}, ValueError, "num_inputs must be at least 1, got 0"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"d_model": 2.5}, TypeError, "d_model must be an int, got float"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"block": "lstm"}, ValueError, "block must be .*'lstm'"),
        ({"norm_type": "group"}, ValueError, "norm_type must be .*'group'"),
        ({"block_options": {"codes": 3}}, TypeError, "codes"),
        ({"block_options": [1]}, TypeError, r"block_options must be a mapping from names to values, got \[1\]"),
        ({"block_options": {"causal": True}}, ValueError, "block_options must not contain 'causal'"),
        ({"block_options": {"d_model": 3}}, ValueError, "block_options must not contain 'd_model'"),
        ({"block": "spade", "block_options": {"global_layers": -1}}, ValueError, "global_layers must be at least 0"),
        ({"causal": "False"}, TypeError, "causal must be a bool, got 'False'"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SequenceEncoder(**{"num_inputs": 30, "d_model": 16, "depth": 1, **options})


def test_wrong_steps_are_named_and_change_nothing():
    model = encoder("s4d", causal=True).eval()
    with torch.no_grad():
        with pytest.raises(TypeError, match="state must be of type BackboneState, from initial_state, got NoneType"):
            model.step(torch.zeros(2, dtype=torch.long), None)
        with pytest.raises(TypeError, match=r"inputs must be a torch\.Tensor"):
            model.step([1], model.initial_state(2))
        state = encoder("s4d", causal=True, depth=3).eval().initial_state(2)
        before = copy.deepcopy(state)
        with pytest.raises(ValueError, match="state must have 2 layers, as the model, got 3"):
            model.step(torch.ones(2, dtype=torch.long), state)
    assert torch.equal(state.layers[0].memory, before.layers[0].memory)


def test_wrong_inputs_are_named():
    model = encoder("s4d")
    with pytest.raises(TypeError, match=r"inputs must be int64 or int32 tokens, got torch.float32"):
        model(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="inputs must have 2 dimensions"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(B, L\) = \(2, 5\)"):
        model(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="pooling must be"):
        SequenceClassifier(model, 3, pooling="max")
    with pytest.raises(ValueError, match="num_outputs must be at least 1"):
        SequenceLM(model, 0)
    with pytest.raises(ValueError, match="2 num_heads"):
        TransformerBlock(16, 3)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_block_equals_a_plain_rewrite(causal):
    """Position by position and head by head, with complex numbers for the rotation."""
    block = TransformerBlock(8, num_heads=2, causal=causal, dtype=torch.float64, d_ff=12)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(x[0], (8,), block.norm1.weight, block.norm1.bias)
    q, k, v = (normed @ block.qkv_proj.weight.T + block.qkv_proj.bias).chunk(3, -1)

    def rotated(row, position, head):
        a, b = row[4 * head : 4 * head + 2], row[4 * head + 2 : 4 * head + 4]
        turn = torch.tensor([position * 1.0, position * 0.01], dtype=torch.float64)
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat([turned.real, turned.imag])

    rows = []
    for i in range(5):
        heads = []
        for head in range(2):
            seen = range(i + 1) if causal else range(5)
            scores = [rotated(q[i], i, head) @ rotated(k[j], j, head) / 4**0.5 for j in seen]
            weights = torch.stack(scores).exp()
            values = v[list(seen), 4 * head : 4 * head + 4]
            heads.append((weights.unsqueeze(-1) * values).sum(0) / weights.sum())
        rows.append(torch.cat(heads))
    y = x[0] + torch.stack(rows) @ block.out_proj.weight.T + block.out_proj.bias
    normed = torch.nn.functional.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias)
    hidden = torch.nn.functional.gelu(normed @ block.ffn.up.weight.T + block.ffn.up.bias)
    assert_close(block(x)[0], y + hidden @ block.ffn.down.weight.T + block.ffn.down.bias, "y")


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_equals_dense(causal):
    fused = TransformerBlock(16, num_heads=2, causal=causal, dtype=torch.float64)
    dense = copy.deepcopy(fused)
    dense.attention = "dense"
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 6:] = mask[1, :4] = mask[2] = True
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    for padding in (None, mask):
        assert_close(dense(x, padding), fused(x, padding), "y")


def test_models_copy_and_load():
    model, tokens = trained("longvq"), torch.randint(VOCABULARY, (2, 9))
    other = encoder("longvq")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(tokens), model(tokens))
    clone = copy.deepcopy(model)
    clone.train()(tokens)
    books = [[m for m in x.modules() if isinstance(m, Codebook)] for x in (model, clone)]
    assert [b.steps.item() for b in books[1]] == [b.steps.item() + 1 for b in books[0]]
