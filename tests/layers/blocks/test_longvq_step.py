"""LongVQBlock.step: equal to `forward` in eval mode for any pieces and masks, and errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers.layers import LongVQBlock, LongVQState
from tests.layers.cases import WIDTH, trained
from tests.tolerances import assert_close

NAMES = ["longvq", "longvq_post", "longvq_rms_glu_ema", "longvq_post_scale"]
each_block = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(1)
    return {name: trained(name, causal=True, dtype=torch.float64) for name in NAMES}


@settings(max_examples=30)
@given(st.data())
@pytest.mark.parametrize("masked", [False, True])
@each_block
def test_pieces_equal_forward(blocks, name, masked, data):
    """Masked tokens take no position: each row equals `forward` of its unmasked tokens alone."""
    block, rows = blocks[name], data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 2), st.integers(0, 12)), max_size=6))
    x = torch.randn(rows, sum(sizes), WIDTH, dtype=torch.float64)
    mask = torch.rand(x.shape[:2]) < data.draw(st.sampled_from([0.2, 0.7, 1.0])) if masked else None
    given_x = x.masked_fill(mask.unsqueeze(-1), torch.nan) if masked else x
    parts = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    with torch.no_grad():
        state, outputs = block.initial_state(rows), []
        for part, own in zip(given_x.split(sizes, 1), parts, strict=True):
            if part.shape[1] == 1 and data.draw(st.booleans()):
                y, same = block.step(part[:, 0], state, None if own is None else own[:, 0])
                y = y.unsqueeze(1)
            else:
                y, same = block.step(part, state, own)
            assert same is state and y.shape == part.shape
            outputs.append(y)
        y = torch.cat(outputs, 1) if outputs else x
        if mask is None:
            assert_close(y, block(x), "y")
            return
        assert (y[mask] == 0).all()
        for row in range(rows):
            kept = ~mask[row]
            assert_close(y[row, kept], block(x[row : row + 1, kept])[0], f"row {row}")
            assert state.attention.lengths[row] == kept.sum()


@each_block
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_a_padded_forward(blocks, name, side):
    block, x = blocks[name], torch.randn(2, 20, WIDTH, dtype=torch.float64)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, : 8 if side == "left" else None] = side == "left"
    if side == "right":
        mask[0, 12:] = True
    with torch.no_grad():
        y, state = block.step(x, block.initial_state(2), mask)
        assert_close(y, block(x, mask), "prompt")
        token = torch.randn(2, WIDTH, dtype=torch.float64)
        y, _ = block.step(token, state)
        for row in range(2):
            alone = torch.cat([x[row, ~mask[row]], token[row : row + 1]])
            assert_close(y[row], block(alone[None])[0, -1], f"row {row}")


@each_block
def test_a_masked_token_keeps_its_row_exactly(blocks, name):
    block = blocks[name]
    with torch.no_grad():
        _, state = block.step(torch.randn(3, 9, WIDTH, dtype=torch.float64), block.initial_state(3))
        for length in (1, 5):
            before, mask = state.clone(), torch.tensor([True, False, True])[:, None].expand(3, length)
            block.step(torch.randn(3, length, WIDTH, dtype=torch.float64), state, mask)
            for old, new in zip(before.tensors(), state.tensors(), strict=True):
                assert torch.equal(old[::2], new[::2])
            assert not torch.equal(before.memory[1], state.memory[1])


@each_block
def test_the_state_is_constant_and_its_rows_can_be_chosen(blocks, name):
    block, x = blocks[name], torch.randn(3, 30, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        state = block.initial_state(3)
        size, tensors = state.nbytes, state.tensors()
        assert state.batch == 3 and size == sum(t.nbytes for t in tensors)
        block.step(x[:, :20], state)
        assert state.nbytes == size
        assert all(new is old for new, old in zip(state.tensors(), tensors, strict=True))
        copied, rows = state.clone(), torch.tensor([2, 0, 0, 1])
        chosen = state.index_select(rows)
        assert chosen.batch == 4 and isinstance(chosen, LongVQState)
        y, _ = block.step(x[rows, 20:], chosen)
        assert_close(y, block(x)[rows, 20:], "chosen rows")
        for old, new in zip(copied.tensors(), state.tensors(), strict=True):
            assert torch.equal(old, new)  # neither the clone nor the chosen rows share memory
        y, _ = block.step(x[:, 20:], copied)
        assert_close(y, block(x)[:, 20:], "clone")
    assert copy.deepcopy(state).nbytes == size
    assert f"memory={tuple(state.memory.shape)}" in repr(state)
    with pytest.raises(TypeError, match="rows must be int64 or int32"):
        state.index_select(torch.tensor([0.0]))


@each_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(name, dtype):
    block = trained(name, causal=True).to(dtype)
    x = torch.randn(2, 30, WIDTH, dtype=dtype)
    with torch.no_grad():
        state = block.initial_state(2)
        y = torch.cat([block.step(part, state)[0] for part in x.split([17, 1, 0, 12], 1)], 1)
        assert y.dtype == dtype and state.attention.dtype == torch.float32
        assert state.memory.real.dtype == torch.float32
        if dtype == torch.float32:
            assert_close(y, block(x), "y")
        else:  # rounding decides the code of a key between two codes
            similar = torch.nn.functional.cosine_similarity(y.float(), block(x).float(), dim=-1)
            assert (similar > 0.99).double().mean() > 0.9


def test_under_autocast():
    block, x = trained("longvq", causal=True), torch.randn(2, 12, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = block.initial_state(2)
        y = torch.cat([block.step(part, state)[0] for part in x.split([9, 1, 2], 1)], 1)
        expected = block(x)
    assert torch.nn.functional.cosine_similarity(y.float().flatten(), expected.float().flatten(), dim=0) > 0.99


def test_steps_teach_nothing():
    block = LongVQBlock(WIDTH, num_codes=6, window=3, d_state=4, causal=True, norm_type="batch").eval()
    before = copy.deepcopy(block.state_dict())
    x = torch.randn(1, 9, WIDTH)
    with torch.no_grad():
        assert_close(block.step(x, block.initial_state(1))[0], block(x), "y")
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_refusals_leave_the_state_alone():
    causal, both = trained("longvq", causal=True), trained("longvq")
    dense = LongVQBlock(WIDTH, num_codes=None, causal=True).eval()
    state, x = causal.initial_state(2), torch.randn(2, WIDTH)
    for block, text in ((both, "causal=True"), (dense, "num_codes must be an int.*every past key")):
        for call in (lambda block: block.initial_state(2), lambda block: block.step(x, state)):
            with pytest.raises(NotImplementedError, match=text):
                call(block)
    with pytest.raises(NotImplementedError, match="no_grad"):
        causal.step(x, state)
    with torch.no_grad():
        for wrong, error, message in (
            ((x[:, :3], state), ValueError, "LongVQBlock.step: x must have shape"),
            ((x.double(), state), TypeError, "LongVQBlock.step: x must have the dtype of the layer"),
            (
                (x, None),
                TypeError,
                "LongVQBlock.step: state must be of type LongVQState, from.*got NoneType",
            ),
            ((x, state.attention), TypeError, "state must be of type LongVQState.*got VQAttentionState"),
            ((x[:1], state), ValueError, "LongVQBlock.step: x must have the B = 2 of the state, got 1"),
            ((x, state, torch.zeros(2, 1, dtype=torch.bool)), ValueError, "key_padding_mask must have 1 dim"),
            ((x, state, torch.zeros(2)), TypeError, "key_padding_mask must be bool"),
        ):
            with pytest.raises(error, match=message):
                causal.step(*wrong)
        with pytest.raises(RuntimeError, match=r"LongVQBlock.step: .*call eval\(\) first"):
            causal.train().step(x, state)
    assert not any(tensor.any() for tensor in state.tensors())
