"""The compiled streaming attention against the dense definition in float64, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.native import threads
from tests.ops.vq.stream import stream_cases

FLOOR = 4e-6  # relative: rounding of inputs and of the result itself


@given(stream_cases(dtype=torch.float32))
@settings(max_examples=150)
def test_equals_the_definition(case):
    out, state = case.pieces("native", torch.float32)
    exact = case.at_once()
    assert out.shape == exact.shape and out.isfinite().all() and torch.equal(state.lengths, case.lengths())
    if out.numel():
        error, plain = ((x - exact).abs().max() for x in (out, case.at_once(torch.float32)))
        assert error <= 3 * plain + FLOOR * (1 + exact.abs().max()), (float(error), float(plain))


@given(stream_cases(dtype=torch.float32))
@settings(max_examples=60)
def test_the_state_equals_that_of_the_definition(case):
    state, expected = case.pieces("native", torch.float32)[1], case.pieces("reference")[1]
    for x, y in zip(state.tensors(), expected.tensors(), strict=True):
        assert x.shape == y.shape and (not x.numel() or (x - y).abs().max() <= 1e-5 * (1 + y.abs().max()))


@given(stream_cases(dtype=torch.bfloat16, max_length=40))
@settings(max_examples=40)
def test_half_types_are_read_as_float32(case):
    out = case.pieces("native", torch.bfloat16)[0]
    whole = case.pieces("native", torch.float32)[0]
    assert out.dtype == torch.bfloat16 and torch.equal(out, whole.bfloat16())


@given(st.data())
@settings(max_examples=60)
def test_codes_found_on_the_way(data):
    """Codes of single tokens: those of the nearest codewords up to rounding, of equal codewords the lowest."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    head_dim, codes = (
        data.draw(st.sampled_from([1, 5, 8, 16, 64, 70])),
        data.draw(st.sampled_from([1, 7, 8, 9, 33, 300])),
    )
    k, codebook = torch.randn(2, 2, 5, head_dim), torch.randn(2, codes, head_dim)
    codebook[:, codes // 2 :] = codebook[:, : codes - codes // 2].clone()  # the second half repeats the first
    state = ops.vq_attention_state(2, codebook, window=6)
    ops.vq_attention_step(k, k, k, codebook, state, backend="native")
    found = state.ring_codes
    distance = (k.double().unsqueeze(3) - codebook[:, None]).square().sum(-1)
    assert (distance.gather(3, found.unsqueeze(3)).squeeze(3) <= distance.amin(-1) * (1 + 1e-5) + 1e-5).all()
    assert ((found < codes // 2) | (codes < 2) | ((codes % 2 == 1) & (found == codes - 1))).all()


@given(stream_cases(dtype=torch.float32, max_length=200))
@settings(max_examples=15)
def test_any_number_of_threads_gives_the_same_bits(case):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            out, state = case.pieces("native", torch.float32)
            results.append((out, *state.tensors()))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("window", [0, 1, 64])
@pytest.mark.parametrize("local_keys", ["quantized", "exact"])
def test_one_long_piece_is_close_to_one_call(window, local_keys):
    q, k, v = torch.randn(3, 1, 2, 1000, 64).unbind(0)
    codebook = torch.randn(2, 100, 64)
    state = ops.vq_attention_state(1, codebook, window=window, local_keys=local_keys)
    out = ops.vq_attention_step(q, k, v, codebook, state, backend="native")
    expected = ops.vq_attention(q, k, v, codebook, causal=True, window=window, local_keys=local_keys, backend="native")
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_works_in_inference_mode():
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind(0)
    codebook = torch.randn(2, 10, 8)
    with torch.inference_mode():
        state = ops.vq_attention_state(1, codebook, window=3)
        parts = zip(*(x.split([20, 1, 9], 2) for x in (q, k, v)), strict=True)
        out = torch.cat([ops.vq_attention_step(*part, codebook, state, backend="native") for part in parts], 2)
        expected = ops.vq_attention(q, k, v, codebook, causal=True, window=3)
    assert (out - expected).abs().max() < 1e-5


def test_declined_dtypes_say_why():
    codebook = torch.randn(1, 3, 4, dtype=torch.float64)
    q = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        ops.vq_attention_step(q, q, q, codebook, ops.vq_attention_state(1, codebook), backend="native")


GOOD = {
    "q": torch.zeros(2, 4, 3, 6),
    "k": torch.zeros(2, 2, 3, 6),
    "v": torch.zeros(2, 2, 3, 5),
    "codebook": torch.zeros(2, 7, 6),
    "codes": torch.zeros(2, 2, 3, dtype=torch.int64),
    "bias": torch.zeros(4, 3),
    "mask": torch.zeros(2, 3, dtype=torch.bool),
    "far_q": None,
    "far_k": None,
    "far_sums": torch.zeros(2, 2, 7, 5),
    "far_counts": torch.zeros(2, 2, 7, dtype=torch.int64),
    "ring_codes": torch.zeros(2, 2, 2, dtype=torch.int64),
    "ring_keys": torch.zeros(2, 2, 2, 6),
    "ring_values": torch.zeros(2, 2, 2, 5),
    "lengths": torch.full((2,), 9),
    "scale": 0.5,
    "window": 3,
    "activation": 0,
}
BAD = {
    "double q": {"q": GOOD["q"].double()},
    "half k": {"k": GOOD["k"].half()},
    "rank of q": {"q": GOOD["q"][0]},
    "heads": {"q": GOOD["q"][:, :3]},
    "length of v": {"v": GOOD["v"][:, :, :2]},
    "codebook": {"codebook": GOOD["codebook"][:1]},
    "codes of another type": {"codes": GOOD["codes"].int()},
    "large codes": {"codes": GOOD["codes"] + 7},
    "negative codes": {"codes": GOOD["codes"] - 1},
    "large codes in the ring": {"ring_codes": GOOD["ring_codes"] + 7},
    "bias": {"bias": torch.zeros(4, 2)},
    "mask": {"mask": torch.zeros(2, 2, dtype=torch.bool)},
    "window": {"window": 4, "bias": None},
    "negative window": {"window": -1, "bias": None},
    "sums": {"far_sums": GOOD["far_sums"][:, :, :6].contiguous()},
    "strided sums": {"far_sums": torch.zeros(2, 2, 5, 7).transpose(2, 3)},
    "counts": {"far_counts": GOOD["far_counts"].int()},
    "narrow keys": {"ring_keys": torch.zeros(2, 2, 2, 5)},
    "values": {"ring_values": GOOD["ring_values"].double()},
    "lengths": {"lengths": torch.zeros(1, dtype=torch.int64)},
    "negative lengths": {"lengths": torch.full((2,), -1)},
    "far_q alone": {"far_q": GOOD["q"]},
    "narrow far_q": {"far_q": GOOD["q"][..., :5], "far_k": GOOD["k"][..., :5]},
    "activation": {"activation": 2},
}


@pytest.mark.parametrize("name", BAD)
def test_the_kernel_itself_refuses_what_would_leave_its_memory(name):
    good = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in GOOD.items()}
    torch.ops.longvq.vq_attention_step(*good.values())
    with pytest.raises(RuntimeError, match="vq_attention_step: "):
        torch.ops.longvq.vq_attention_step(*{**GOOD, **BAD[name]}.values())
