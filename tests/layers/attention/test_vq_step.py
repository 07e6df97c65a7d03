"""VQAttention.step: equal to `forward` in eval mode, without learning, and errors."""

import pytest
import torch

from longvq_layers.layers import CodebookAttention, VQAttention
from tests.layers.cases import WIDTH, trained
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ["vq", "vq_exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_and_pieces_equal_forward(name, dtype):
    layer = trained(name, causal=True, dtype=dtype)
    x = torch.randn(2, 60, WIDTH, dtype=dtype)
    with torch.no_grad():
        state, outputs = layer.initial_state(2), []
        for part in x.split([40, 0, 1, 10, 9], 1):
            y, same = layer.step(part, state)
            assert same is state
            outputs.append(y)
        one = layer.initial_state(2)
        tokens = [layer.step(x[:, t], one)[0] for t in range(60)]
        expected = layer(x)
    assert_close(torch.cat(outputs, 1), expected, "pieces")
    assert_close(torch.stack(tokens, 1), expected, "tokens")


def test_padded_prompts_continue_at_their_own_lengths():
    layer = trained("vq", causal=True)
    x = torch.randn(2, 30, WIDTH)
    padded, mask = x.clone(), torch.zeros(2, 30, dtype=torch.bool)
    mask[0, :20] = True
    padded[0, :20], padded[0, 20:] = torch.nan, x[0, :10]
    with torch.inference_mode():
        state = layer.initial_state(2)
        y, _ = layer.step(padded, state, mask)
        token, _ = layer.step(torch.stack([x[0, 10], x[1, 0]]), state)
        skipped, _ = layer.step(x[:, 0], state, torch.tensor([True, False]))
        alone = layer(x[:1, :11])
        other = layer(torch.cat([x[1:], x[1:, :1]], 1))
    assert (y[0, :20] == 0).all() and (skipped[0] == 0).all() and state.lengths.tolist() == [11, 32]
    assert_close(y[0, 20:], alone[0, :10], "prompt")
    assert_close(token[0], alone[0, 10], "token")
    assert_close(token[1], other[0, 30], "token of the full row")


def test_steps_teach_nothing_even_before_the_first_batch():
    layer = VQAttention(WIDTH, 2, num_codes=6, window=3, causal=True).eval()
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    x = torch.randn(1, 20, WIDTH)
    with torch.no_grad():
        y, _ = layer.step(x, layer.initial_state(1))
        assert_close(y, layer(x), "y")
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_half_precision_layers_keep_a_float32_state():
    layer = trained("vq", causal=True).bfloat16()
    x = torch.randn(2, 20, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        state = layer.initial_state(2)
        y = torch.cat([layer.step(part, state)[0] for part in x.split([17, 1, 2], 1)], 1)
        expected = layer(x)
    assert state.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert_close(y, expected, "y")


def test_value_dim_may_differ_from_head_dim():
    core = CodebookAttention(4, 2, 8, value_dim=5, num_codes=6, window=3, causal=True).eval()
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 5)
    with torch.no_grad():
        assert_close(core.step(q, k, v, core.initial_state(1)), core(q, k, v), "out")
    with pytest.raises(ValueError, match="H = 4 heads"):
        core.step(q[:, :2], k, v, core.initial_state(1))


def test_refusals():
    causal, both = trained("vq", causal=True), trained("vq")
    state, x = causal.initial_state(2), torch.randn(2, WIDTH)
    for call in (lambda: both.initial_state(2), lambda: both.step(x, state)):
        with pytest.raises(NotImplementedError, match="causal=True"):
            call()
    with pytest.raises(NotImplementedError, match="no_grad"):
        causal.step(x, state)
    with torch.no_grad():
        for wrong, error, message in (
            ((x[:, :3], state), ValueError, "x must have shape"),
            ((x.double(), state), TypeError, "dtype of the layer"),
            ((x, None), TypeError, "state must be of type VQAttentionState"),
            ((x[:1], state), ValueError, "k and v must have"),
            ((x, state, torch.zeros(2, 1, dtype=torch.bool)), ValueError, "key_padding_mask must have 1 dim"),
            ((x, causal.initial_state(2).to("meta")), ValueError, "state must be on the device"),
        ):
            with pytest.raises(error, match=message):
                causal.step(*wrong)
        with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
            causal.train().step(x, state)
    assert not any(x.any() for x in state.tensors())
