"""SPADEBlock.step: equal to `forward` in eval mode, and errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers.layers import SPADEBlock, SPADEState
from tests.tolerances import assert_close

FORMS = (
    {},
    {"combine": "add", "norm": "post"},
    {"combine": "stack", "norm_type": "batch"},
    {"global_ssm": False},
    {"cross_attention": True},
)


def make(**options):
    options = {"window": 4, "d_state": 4, "causal": True, **options}
    block = SPADEBlock(8, 2, **options).eval()
    torch.nn.init.normal_(block.local.window_bias)
    return block


def memory_of(block, rows, dtype=torch.float32):
    return None if block.cross is None else torch.randn(rows, 5, 8, dtype=dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_and_pieces_equal_forward(form, dtype):
    block = make(**form, dtype=dtype)
    x, memory = torch.randn(2, 60, 8, dtype=dtype), memory_of(block, 2, dtype)
    with torch.no_grad():
        state, outputs = block.initial_state(2, memory), []
        size = state.nbytes
        for part in x.split([40, 0, 1, 10, 9], 1):
            y, same = block.step(part, state)
            assert same is state
            outputs.append(y)
        one = block.initial_state(2, memory)
        tokens = [block.step(x[:, t], one)[0] for t in range(60)]
        expected = block(x, memory=memory)
    assert state.nbytes == size and state.lengths.tolist() == [60, 60]
    assert_close(torch.cat(outputs, 1), expected, "pieces")
    assert_close(torch.stack(tokens, 1), expected, "tokens")


@given(st.data())
@settings(max_examples=20)
def test_masked_tokens_take_no_position(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    block = make(**data.draw(st.sampled_from(FORMS)), dtype=torch.float64)
    length = data.draw(st.integers(0, 30))
    x, memory = torch.randn(3, length, 8).double(), memory_of(block, 3, torch.float64)
    hidden = None if memory is None else torch.rand(3, 5) < 0.4
    mask = torch.rand(3, length) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    filled = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    with torch.no_grad():
        state, outputs = block.initial_state(3, memory, hidden), []
        for part, m in zip(filled.tensor_split(cuts, 1), mask.tensor_split(cuts, 1), strict=True):
            if part.shape[1] == 1:
                outputs.append(block.step(part[:, 0], state, m[:, 0])[0].unsqueeze(1))
            else:
                outputs.append(block.step(part, state, m)[0])
        y = torch.cat(outputs, 1)
        assert (y[mask] == 0).all()
        for row in range(3):
            mine, at = ~mask[row], slice(row, row + 1)
            given_memory = {} if memory is None else {"memory": memory[at], "memory_key_padding_mask": hidden[at]}
            assert_close(y[row, mine], block(x[at, mine], **given_memory)[0], "row")


def test_a_masked_row_keeps_its_state_exactly():
    block = make(cross_attention=True)
    with torch.no_grad():
        _, state = block.step(torch.randn(2, 7, 8), block.initial_state(2, torch.randn(2, 5, 8)))
        before = state.clone()
        block.step(torch.randn(2, 3, 8), state, torch.tensor([[True] * 3, [False] * 3]))
    for new, old in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(new[0], old[0])
    assert not torch.equal(state.ssm[1], before.ssm[1]) and not torch.equal(state.local.keys[1], before.local.keys[1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_state_can_be_cloned_and_selected(form):
    block = make(**form)
    x = torch.randn(3, 12, 8)
    with torch.no_grad():
        _, state = block.step(x, block.initial_state(3, memory_of(block, 3)))
        picked, kept = state.index_select(torch.tensor([2, 0, 0, 1])), copy.deepcopy(state)
        expected, _ = block.step(x[:, 3], state.clone())
        y, _ = block.step(x[[2, 0, 0, 1], 3], picked)
    assert_close(y, expected[[2, 0, 0, 1]], "y")
    assert isinstance(kept, SPADEState)
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors(), state.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    block = make().to(dtype)
    x = torch.randn(2, 20, 8, dtype=dtype)
    with torch.no_grad():
        state = block.initial_state(2)
        y = torch.cat([block.step(part, state)[0] for part in x.split([17, 1, 2], 1)], 1)
        expected = block(x)
    assert state.ssm.dtype == torch.complex64 and y.dtype == dtype
    assert torch.nn.functional.cosine_similarity(y.float().flatten(), expected.float().flatten(), dim=0) > 0.999
    block = make()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y, _ = block.step(x.float(), block.initial_state(2))
        assert torch.nn.functional.cosine_similarity(y.float().flatten(), block(x.float()).flatten(), dim=0) > 0.999


def test_refusals():
    block, both, decoder = make(), make(causal=False), make(cross_attention=True)
    state, x = block.initial_state(2), torch.randn(2, 8)
    for call in (lambda: both.initial_state(2), lambda: both.step(x, state)):
        with pytest.raises(NotImplementedError, match=r"SPADEBlock.*causal=True"):
            call()
    with pytest.raises(NotImplementedError, match="no_grad"):
        block.step(x, state)
    with pytest.raises(ValueError, match=r"SPADEBlock\.initial_state: memory must be given"):
        decoder.initial_state(2)
    with pytest.raises(ValueError, match="memory must be None"):
        block.initial_state(2, torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"memory must have shape .* = \(2, 3, 8\)"):
        decoder.initial_state(2, torch.randn(1, 3, 8))
    with torch.no_grad():
        for wrong, error, message in (
            ((x[:, :3], state), ValueError, "x must have shape"),
            ((x.double(), state), TypeError, "dtype of the layer"),
            ((x, None), TypeError, "state must be of type SPADEState"),
            ((x[:1], state), ValueError, r"state\.keys must have shape"),
            ((x, make(global_ssm=False).initial_state(2)), ValueError, "state must be of a block with an SSM"),
            ((x, decoder.initial_state(2, torch.randn(2, 3, 8))), ValueError, "of a block without cross-attention"),
            ((x, make(d_state=6).initial_state(2)), ValueError, r"state\.ssm must have shape"),
            ((x, state, torch.zeros(2, 1, dtype=torch.bool)), ValueError, "key_padding_mask must have 1 dim"),
        ):
            with pytest.raises(error, match=message):
                block.step(*wrong)
        with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
            block.train().step(x, state)
    assert not any(t.any() for t in state.tensors())
