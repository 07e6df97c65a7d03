"""MegaBlock.step: pieces of any length equal the whole, rows are independent, the state stays small, and errors."""

import copy
import io
import pickle

import pytest
import torch

from longvq_layers.layers import MegaBlock, MegaState
from tests.tolerances import assert_close

WIDTH, CHUNK = 16, 5

VARIANTS = {
    "softmax": {},
    "laplace": {"activation": "laplace", "rel_pos_bias": "simple", "norm": "post"},
    "relu2": {"activation": "relu2", "norm_type": "batch", "d_ff": 0},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make(variant="softmax", dtype=torch.float64, chunk=CHUNK, **options):
    block = MegaBlock(WIDTH, ema_dim=4, chunk=chunk, causal=True, dtype=dtype, **VARIANTS[variant], **options)
    for name, parameter in block.named_parameters():
        if not name.startswith("norm"):  # larger than initial values, so that attention matters
            parameter.add_(torch.randn_like(parameter) / 3)
    block(torch.randn(2, 30, WIDTH, dtype=dtype))  # so that batch norms have statistics
    return block.eval()


@each_variant
@pytest.mark.parametrize("pieces", [[1] * 17, [17], [3, 0, 1, 1, 7, 5], [5, 5, 1, 6], [4, 1, 12]])
@pytest.mark.parametrize("chunk", [1, CHUNK, 40])
def test_pieces_equal_the_whole(variant, pieces, chunk):
    block, x = make(variant, chunk=chunk), torch.randn(2, 17, WIDTH, dtype=torch.float64)
    state, outputs = block.initial_state(2), []
    size = state.nbytes
    for piece in x.split(pieces, dim=1):
        y, state = block.step(piece, state)
        assert y.shape == piece.shape
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), block(x), "output")
    assert state.nbytes == size and state.lengths.tolist() == [17, 17]


@each_variant
@pytest.mark.parametrize("pieces", [[1] * 12, [12], [6, 1, 5]])
def test_masked_tokens_take_no_position(variant, pieces):
    block = make(variant)
    x, mask = torch.randn(4, 12, WIDTH, dtype=torch.float64), torch.rand(4, 12) < 0.4
    mask[1], mask[2], mask[3] = False, True, torch.arange(12) < 7
    state, outputs = block.initial_state(4), []
    filled = x.masked_fill(mask.unsqueeze(-1), float("nan"))
    for piece, part in zip(filled.split(pieces, dim=1), mask.split(pieces, dim=1), strict=True):
        before = state.clone()
        y, state = block.step(piece, state, part)
        for b in part.all(1).nonzero().flatten():
            assert all(torch.equal(new[b], old[b]) for new, old in zip(state.tensors(), before.tensors(), strict=True))
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert (y[mask] == 0).all()
    for b in range(4):
        assert_close(y[b, ~mask[b]], block(x[b : b + 1, ~mask[b]])[0], f"row {b}")
    assert state.lengths.tolist() == (~mask).sum(1).tolist()


def test_one_token_without_a_time_axis():
    block, x = make(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    state, other = block.initial_state(2), block.initial_state(2)
    for t in range(3):
        mask = torch.tensor([False, t == 1])
        y, state = block.step(x[:, t], state, mask)
        expected, other = block.step(x[:, t : t + 1], other, mask.unsqueeze(1))
        assert y.shape == (2, WIDTH) and torch.equal(y, expected[:, 0])


@pytest.mark.parametrize("length", [3, 8])
def test_states_are_cloned_selected_and_moved(length):
    block, x = make(), torch.randn(3, 20, WIDTH, dtype=torch.float64)
    _, state = block.step(x[:, :length], block.initial_state(3))
    branch, rows = state.clone(), torch.tensor([2, 0, 0, 1])
    chosen = state.index_select(rows)
    block.step(-x, state)
    assert_close(block.step(x[:, length:], branch)[0], block(x)[:, length:], "branch")
    assert chosen.batch == 4
    y, _ = block.step(x[rows, length:], chosen)
    assert_close(y, block(x)[rows, length:], "rows")
    saved = io.BytesIO()
    pickle.dump(state, saved)
    again = pickle.loads(saved.getvalue())
    for copied in (again, copy.deepcopy(state), state.to("cpu")):
        assert all(torch.equal(a, b) for a, b in zip(copied.tensors(), state.tensors(), strict=True))
    assert repr(state).startswith("MegaState(ema=(3, 16, 4), keys=(3, 5, 8)")
    with pytest.raises(TypeError, match=r"MegaState.index_select: rows must be int64 or int32, got torch\.float32"):
        state.index_select(torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    block = make(dtype=torch.float32).to(dtype)
    x = torch.randn(2, 14, WIDTH).to(dtype)
    state, outputs = block.initial_state(2), []
    assert state.ema.dtype == torch.float32 and state.keys.dtype == dtype
    for piece in x.split([6, 1, 1, 1, 5], dim=1):
        y, state = block.step(piece, state)
        assert y.dtype == dtype
        outputs.append(y)
    # Each output has some hundred roundings in half precision, in a different order than in `forward`.
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    whole = block(x)
    assert (torch.cat(outputs, 1) - whole).abs().max() <= bound * (1 + whole.abs().max())


def test_autocast_and_inference_mode():
    block, x = make(dtype=torch.float32), torch.randn(2, 9, WIDTH)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        state, outputs = block.initial_state(2), []
        for piece in x.split([4, 1, 1, 3], dim=1):
            y, state = block.step(piece, state)
            outputs.append(y.float())
    y = torch.cat(outputs, 1)
    assert torch.nn.functional.cosine_similarity(y.flatten(), block(x).flatten(), dim=0) > 0.99


def test_empty_batches_and_pieces():
    block = make()
    for batch, length in ((0, 3), (2, 0), (0, 0), (0, 1)):
        y, state = block.step(torch.randn(batch, length, WIDTH, dtype=torch.float64), block.initial_state(batch))
        assert y.shape == (batch, length, WIDTH) and state.lengths.tolist() == [0] * batch


def test_refusals_are_named():
    block, x = make(), torch.randn(2, WIDTH, dtype=torch.float64)
    state = block.initial_state(2)
    for method, call in (("step", lambda b: b.step(x.float(), state)), ("initial_state", lambda b: b.initial_state(1))):
        with pytest.raises(NotImplementedError, match=rf"MegaBlock\.{method}: causal must be True.*bidirectional"):
            call(MegaBlock(WIDTH, chunk=4).eval())
        with pytest.raises(NotImplementedError, match=rf"MegaBlock\.{method}: chunk must be an int.*every past key"):
            call(MegaBlock(WIDTH, causal=True).eval())
    with pytest.raises(RuntimeError, match=r"MegaBlock\.step: the block must be in eval mode, got training mode"):
        make().train().step(x, state)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match=r"call it under torch\.no_grad\(\)"):
        block.step(x, state)
    with pytest.raises(TypeError, match="state must be of type MegaState, from initial_state, got Tensor"):
        block.step(x, state.ema)
    with pytest.raises(ValueError, match=r"state.keys must have shape \(B, chunk, d_attn\) = \(3, 5, 8\), got \(2"):
        block.step(torch.randn(3, WIDTH, dtype=torch.float64), state)
    with pytest.raises(ValueError, match=r"x must have shape .*\(2, 1, 16\), got \(2, 1, 15\)"):
        block.step(x[:, 1:], state)
    with pytest.raises(TypeError, match=r"x must have the dtype of the layer, torch.float64, got torch.float32"):
        block.step(x.float(), state)
    with pytest.raises(ValueError, match=r"key_padding_mask must have 1 dimensions \(B\), got 2"):
        block.step(x, state, torch.zeros(2, 1, dtype=torch.bool))
    assert state.lengths.tolist() == [0, 0] and isinstance(state, MegaState)
