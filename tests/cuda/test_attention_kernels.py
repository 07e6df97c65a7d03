"""The kernels of `csrc/cuda/vq/attention` against the definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.ops.vq.operator_calls import attention_arguments
from tests.strategies import AttentionCase, attention_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative: rounding of results


def arguments(case: AttentionCase, codes, dtype, near_dim=0):
    """The arguments of the operator; with near_dim, the columns of q and k after it become far_q and far_k."""
    o = case.options
    bias = None if o["bias"] is None else o["bias"].float()
    scale = o["scale"] if o["scale"] is not None else (near_dim or case.q.shape[-1]) ** -0.5
    tensors = [torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) for x in (case.q, case.k, case.v)]
    q, k, v = tensors
    codebook, far = case.codebook.float(), {}
    if near_dim:
        (q, far["far_q"]), (k, far["far_k"]) = (x.tensor_split([near_dim], dim=-1) for x in (q, k))
        codebook = codebook[..., near_dim:]
    return attention_arguments(
        q,
        k,
        v,
        codebook,
        codes,
        bias=bias,
        key_padding_mask=o["key_padding_mask"],
        cu_seqlens=o.get("cu_seqlens"),
        **far,
        scale=scale,
        **{name: o[name] for name in ("causal", "window", "activation", "local_keys", "key_grad")},
    )


def in_double(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def results(namespace, args, grad):
    """(output and gradients by name, normalizers); gradients of far_q and far_k are joined to dq and dk."""
    out, normalizers = namespace.vq_attention(*args)
    *gradients, dfar_q, dfar_k = namespace.vq_attention_backward(grad.to(args[0].dtype), out, normalizers, *args)
    found = {"out": out, **dict(zip(("dq", "dk", "dv", "dbias"), gradients, strict=True))}
    if dfar_q.dim() == 4:
        found |= {"dq": torch.cat([found["dq"], dfar_q], -1), "dk": torch.cat([found["dk"], dfar_k], -1)}
    return found, normalizers


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def assert_as_good_as_plain(kernels, case, codes, dtype, near_dim=0):
    """Errors are at most twice those of the PyTorch backend in `dtype`, codewords included, plus some rounding."""
    args = arguments(case, codes, dtype, near_dim)
    torch.manual_seed(1)
    grad = torch.randn(*case.q.shape[:3], case.v.shape[-1], dtype=torch.float64).to(dtype).double()
    actual, normalizers = results(kernels, args, grad)
    exact, exact_normalizers = results(torch.ops.longvq_torch, in_double(args), grad)
    plain, _ = results(torch.ops.longvq_torch, (*args[:3], args[3].to(dtype).float(), *args[4:]), grad)
    terms = {"out": case.v, "dv": case.v, "dk": case.q, "dq": case.k, "dbias": case.v}
    keys = torch.cat(
        [case.k.to(case.codebook.dtype), case.codebook.expand(len(case.k), -1, -1, -1)], 2
    ).repeat_interleave(case.q.shape[1] // case.k.shape[1], 1)
    # Rounding of scores becomes a factor of the weights.
    scores = 1 + args[10] * largest(case.q.double() @ keys.double().transpose(2, 3))
    for name, value in actual.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.isfinite().all(), name
        if value.numel():
            assert value.dtype == plain[name].dtype, name
            error, other = (largest(x.double() - expected) for x in (value, plain[name]))
            # Where terms cancel, the result has the error of the terms: of values, or of queries or keys times values.
            size = largest(expected) + largest(terms[name])
            floor = FLOOR[dtype] * size + 2**-21 * scores * size
            assert error <= 2 * other + floor, (name, error, other, floor)
    if case.options["activation"] == "softmax" and dtype == torch.float32 and normalizers.numel():
        logarithms = [n[..., 0].double() + n[..., 1].double().log() for n in (normalizers, exact_normalizers)]
        difference = (logarithms[0] - logarithms[1]).abs()
        if case.options["key_padding_mask"] is not None:
            difference = difference.masked_fill(case.options["key_padding_mask"][:, None], 0)
        assert difference.max() <= 1e-5 * (1 + logarithms[1].abs().max())


def rounded(case, dtype):
    """(the case with inputs rounded to `dtype`, the codes of its keys)"""
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        x.copy_(x.to(dtype))
    case.codebook = case.codebook.float().double()
    if case.options["bias"] is not None:
        case.options["bias"] = case.options["bias"].float().double()
    return case, ops.vq_assign(case.k, case.codebook, backend="reference")


@pytest.mark.parametrize("packed", [False, True])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=25)
def test_equals_the_definition(kernels, packed, data, dtype):
    case = data.draw(attention_cases(max_length=200, packed=packed))
    if dtype == torch.float16 and case.options["activation"] == "laplace":
        dtype = torch.float32
    assert_as_good_as_plain(kernels, *rounded(case, dtype), dtype)


def drawn(length, head_dim, value_dim, codes, causal, window, exact, heads=(2, 1), activation="softmax", batch=1):
    options = {
        "causal": causal,
        "window": window,
        "bias": torch.randn(heads[0], window if causal else 2 * window - 1) if window else None,
        "key_padding_mask": None,
        "scale": None,
        "activation": activation,
        "local_keys": "exact" if exact else "quantized",
        "key_grad": "cluster",
    }
    q, k = torch.randn(batch, heads[0], length, head_dim), torch.randn(batch, heads[1], length, head_dim)
    v, codebook = torch.randn(batch, heads[1], length, value_dim), torch.randn(heads[1], codes, head_dim)
    return AttentionCase(q, k, v, codebook, options)


@pytest.mark.parametrize(
    ("dtype", "exact", "causal"),
    [
        (torch.bfloat16, False, False),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, True),
        (torch.float16, True, True),
        (torch.float32, True, False),
        (torch.float32, False, True),
    ],
)
@pytest.mark.parametrize(
    ("length", "head_dim", "value_dim", "codes", "window"),
    [(180, 64, 64, 70, 40), (150, 128, 130, 33, 0), (130, 65, 20, 64, 128), (140, 16, 128, 530, 5)],
)
def test_sizes_around_the_tiles(kernels, dtype, exact, causal, length, head_dim, value_dim, codes, window):
    case, z = rounded(drawn(length, head_dim, value_dim, codes, causal, window, exact), dtype)
    assert_as_good_as_plain(kernels, case, z, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "batch", "window", "dtype"),
    [(2 * 2048 + 70, 1, 200, torch.bfloat16), (2048 + 130, 2, 9, torch.float32)],
)
def test_segments(kernels, causal, length, batch, window, dtype):
    """Far fields add the sums of the segments before (and after). Gradients of codes add those of all segments."""
    case = drawn(length, 8, 8, 9, causal, window, True, heads=(1, 1), batch=batch)
    assert_as_good_as_plain(kernels, *rounded(case, dtype), dtype)


def test_all_far_in_segments(kernels):
    case = drawn(16 * 128 + 70, 16, 8, 9, False, 0, False, heads=(1, 1), batch=2)
    assert_as_good_as_plain(kernels, *rounded(case, torch.float32), torch.float32)


LENGTHS = (0, 60, 130, 1, 0, 16 * 128 + 130, 127, 128, 0)  # of documents: one has two segments, some are empty


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize(("causal", "window"), [(False, 30), (True, 30), (False, 0), (True, 0)])
def test_packed_documents(kernels, causal, window, activation):
    case = drawn(sum(LENGTHS), 16, 8, 9, causal, window, window > 0, activation=activation)
    case.options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    case.options["key_padding_mask"] = torch.rand(1, sum(LENGTHS)) < 0.1
    case, z = rounded(case, torch.bfloat16)
    assert_as_good_as_plain(kernels, case, z, torch.bfloat16)


@pytest.mark.parametrize("offsets", [[0, 50, 20, 150], [-9, 10**9, 7, 10**9], [3, 140], [0, 150, 150]])
def test_wrong_offsets_cause_no_wrong_addresses(kernels, offsets):
    """Nobody checks offsets before the kernels. Results are undefined, but kernels access only their tensors."""
    case, z = rounded(drawn(150, 16, 8, 9, True, 30, True), torch.float32)
    case.options["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    results(kernels, arguments(case, z, torch.float32), torch.randn(1, 2, 150, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dims", "window"),
    [((32, 32), 30), ((40, 8), 30), ((8, 40), 30), ((32, 32), 150)],  # 150: all keys of some blocks are inside
)
def test_far_queries_and_keys(kernels, dtype, head_dims, window):
    near, far = head_dims
    case = drawn(200, near + far, 24, 20, True, window, True)
    case.codebook[..., :near] = 0
    case, _ = rounded(case, dtype)
    z = ops.vq_assign(case.k[..., near:], case.codebook[..., near:])
    assert_as_good_as_plain(kernels, case, z, dtype, near_dim=near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_order_of_threads_and_blocks_makes_no_difference(on_host, thread_order, dtype, exact, causal):
    case, z = rounded(drawn(150, 20, 24, 70, causal, 10, exact), dtype)
    case.options["cu_seqlens"] = torch.tensor([0, 20, 150], dtype=torch.int32)
    found, grad = [], torch.randn(1, 2, 150, 24)
    for order in (0, 1, 2, 3):
        thread_order(order)
        found.append(results(on_host, arguments(case, z, dtype), grad)[0])
    for other in found[1:]:
        assert all(torch.equal(found[0][name], value) for name, value in other.items())


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_the_order_of_blocks_makes_no_difference_to_segments(on_host, thread_order, causal):
    case, z = rounded(drawn(2048 + 130, 8, 8, 9, causal, 30, True, heads=(1, 1)), torch.bfloat16)
    found, grad = [], torch.randn(1, 1, 2048 + 130, 8)
    for order in (0, 1):
        thread_order(order)
        found.append(results(on_host, arguments(case, z, torch.bfloat16), grad)[0])
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", ["huge scores", "one code", "equal keys", "no key", "largest masked"])
@pytest.mark.parametrize("causal", [False, True])
def test_extremes(kernels, dtype, special, causal):
    case = drawn(140, 16, 16, 24, causal, 9, True, heads=(2, 2))
    mask = torch.zeros(1, 140, dtype=torch.bool)
    if special == "huge scores":
        case.q *= 1e3
    elif special == "one code":
        case.codebook[:, 1:] += 1e3
    elif special == "equal keys":
        case.k[:] = 0.25
    elif special == "no key":
        mask[:] = True
    else:
        case.codebook[:, 0] = 100.0
        case.k[:, :, ::2] = 100.0
        case.q.abs_()
        mask[:, ::2] = True
    case.options["key_padding_mask"] = mask
    case, z = rounded(case, dtype)
    if special == "huge scores":  # the key with the largest weight may depend on the rounding of codewords
        out, _ = kernels.vq_attention(*arguments(case, z, dtype))
        assert out.isfinite().all()
        if dtype != torch.float32:
            return
    assert_as_good_as_plain(kernels, case, z, dtype)


def test_no_head_of_queries(kernels):
    case, z = rounded(drawn(20, 16, 16, 5, True, 4, True, heads=(0, 1)), torch.float32)
    case.options["bias"] = None
    found, _ = results(kernels, arguments(case, z, torch.float32), torch.zeros(1, 0, 20, 16))
    assert not found["dk"].any() and not found["dv"].any()


@pytest.mark.parametrize("head_dim", [16, 80])
def test_no_column_of_values(kernels, head_dim):
    case, z = rounded(drawn(20, head_dim, 0, 5, True, 4, True), torch.float32)
    found, _ = results(kernels, arguments(case, z, torch.float32), torch.zeros(1, 2, 20, 0))
    assert found["out"].shape == (1, 2, 20, 0) and not any(found[name].any() for name in ("dq", "dk", "dv", "dbias"))


def test_wrong_arguments(kernels):
    case, z = rounded(drawn(20, 16, 16, 5, True, 4, True), torch.float32)
    good = arguments(case, z, torch.float32)
    for position, wrong, message in [
        (1, good[1][:, :, :-1], "k must be .* with the B, L, D and dtype of q"),
        (2, good[2].half(), r"v must be .* dtype of q, got .* float16"),
        (4, z.int(), r"codes must be \(B, Hkv, L\) int64, got .* int32"),
        (5, good[5][:, :-1], "bias must be"),
        (6, torch.zeros(1, 19, dtype=torch.bool), "key_padding_mask must be"),
        (7, torch.tensor([0, 20]), r"cu_seqlens must be \(N \+ 1,\) int32, got \(2\) int64"),
        (7, torch.tensor([0], dtype=torch.int32), "cu_seqlens must hold a document for the 20 positions, got none"),
        (8, good[0], "far_q and far_k must be given together"),
        (12, -1, "window must be at least 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.vq_attention(*good[:position], wrong, *good[position + 1 :])
    out, normalizers = kernels.vq_attention(*good)
    for wrong, message in [
        ((out[..., 1:], out, normalizers), r"grad must be \(B, H, L, E\)"),
        ((out, out[:, :1], normalizers), r"out must be \(B, H, L, E\)"),
        ((out, out.half(), normalizers), "out must be .* in the dtype of v.*, got .* float16"),
        ((out, out, normalizers[..., 0]), r"normalizers must be \(B, H, L, 2\) float32, got \(1, 2, 20\) float32"),
        ((out, out, normalizers.double()), r"normalizers must be .* float32, got .* float64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.vq_attention_backward(*wrong, *good)
