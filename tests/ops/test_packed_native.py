"""Packed documents in the compiled kernels give the same bits as each document alone, on every instruction set."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longvq_layers import ops
from tests.native import assert_as_good_as_plain_float32, drawn, run, threads
from tests.strategies import NativeScanCase, attention_cases, native_scan_cases

OF_A_DOCUMENT = {"y": 1, "u": 1, "state": 0, "initial_state": 0}  # all others are sums over documents


def spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]


def packed(lengths: list[int], channels: int = 17, modes: int = 3, **options) -> NativeScanCase:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    case = drawn(1, sum(lengths), channels, modes, **options)
    states = drawn(len(lengths), 0, channels, modes, **options)
    case.options["cu_seqlens"] = cu_seqlens
    case.arguments["initial_state"], case.grad_state = states.arguments["initial_state"], states.grad_state
    return case


def results(case: NativeScanCase) -> dict[str, Tensor]:
    return run(case.leaves(), "native", case)


def alone(case: NativeScanCase, n: int, at: slice) -> NativeScanCase:
    """Document n as a separate row, a view of the same memory."""
    own = {"u": at, "initial_state": slice(n, n + 1)}
    arguments = {
        name: x[:, at] if name == "u" else x[own[name]] if name in own else x for name, x in case.arguments.items()
    }
    mask = case.options["key_padding_mask"]
    options = {"key_padding_mask": None if mask is None else mask[:, at], "reverse": case.options["reverse"]}
    return NativeScanCase(arguments, options, case.grad_y[:, at], case.grad_state[n : n + 1])


def assert_each_document_is_as_alone(case: NativeScanCase) -> None:
    whole, documents = results(case), spans(case.options["cu_seqlens"])
    sums = {name: 0.0 for name in whole.keys() - OF_A_DOCUMENT.keys()}
    for n, at in enumerate(documents):
        for name, value in results(alone(case, n, at)).items():
            if name in sums:
                sums[name] = sums[name] + value.to(torch.cdouble if value.is_complex() else torch.double)
                continue
            axis = OF_A_DOCUMENT[name]
            place = at if axis else slice(n, n + 1)
            assert torch.equal(value, whole[name].narrow(axis, place.start, place.stop - place.start)), (name, n)
    for name, total in sums.items():
        if documents and whole[name].numel():
            # The packed sum is rounded to float32 once, the other once per document.
            error = (whole[name] - total).abs().max()
            assert error <= 1e-6 * len(documents) * (1 + total.abs().max()), (name, float(error))


@given(native_scan_cases(packed=True, max_length=150))
@settings(max_examples=60)
def test_scan_as_accurate_as_the_recurrence_with_gradients(case):
    assert_as_good_as_plain_float32(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=20)
def test_scan_of_half_types_is_rounded_once(dtype, data):
    assert_as_good_as_plain_float32(data.draw(native_scan_cases(dtype, packed=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=40)
def test_scan_gives_each_document_the_bits_that_it_gets_alone(dtype, data):
    assert_each_document_is_as_alone(data.draw(native_scan_cases(dtype, packed=True, max_length=150)))


# Documents longer than a segment, shorter than a chunk, of one step and empty: side by side and at both ends.
# More documents than blocks of documents, so that documents of different lengths share tables.
LENGTHS = [[0, 700, 1, 0, 33, 1200, 5, 32], [1, 0], [0, 0], [3] * 100, [10, 1500, 31, 0], [65] * 33]
LENGTHS.append([0, 33, 1, 64, 5] * 14)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} documents of {sum(lengths)}")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_scan_of_documents_of_all_lengths(lengths, reverse, complex_modes):
    case = packed(lengths, complex_modes=complex_modes, reverse=reverse)
    assert_as_good_as_plain_float32(case, oracle="torch")
    assert_each_document_is_as_alone(case)


@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("complex_modes", [False, True])
def test_any_number_of_threads_gives_the_same_bits_of_a_scan(channels, complex_modes):
    case = packed([0, 300, 7, 64, 1, 500, 40, 0] * 9, channels, complex_modes=complex_modes)
    with threads(1):
        expected = results(case)
    for count in (2, 3, 8):
        with threads(count):
            assert all(torch.equal(value, expected[name]) for name, value in results(case).items())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_one_document_changes_nothing_elsewhere(reverse):
    case = packed([40, 0, 1, 89, 70], reverse=reverse)
    case.options["key_padding_mask"] = None
    before = results(case)
    place = slice(41, 130)
    for name in ("u", "grad_y"):
        x = case.grad_y if name == "grad_y" else case.arguments["u"]
        x[:, place] = torch.nan
    after = results(case)
    for name in ("y", "u"):
        assert after[name][:, place].isnan().all()
        after[name][:, place] = before[name][:, place]
        assert torch.equal(after[name], before[name]), name
    for name in ("state", "initial_state"):
        assert not torch.equal(after[name][3], before[name][3])
        after[name][3] = before[name][3]
        assert torch.equal(after[name], before[name]), name


def test_a_packed_row_is_the_batch_of_its_documents():
    """The same sums in the same order give the same bits, also in the gradients of parameters."""
    batch = drawn(40, 70, 5, 3)
    row = packed([70] * 40, 5, 3)
    row.arguments = {**batch.arguments, "u": batch.arguments["u"].reshape(1, 2800, 5)}
    row.options["key_padding_mask"] = batch.options["key_padding_mask"].reshape(1, 2800)
    row.grad_y, row.grad_state = batch.grad_y.reshape(1, 2800, 5), batch.grad_state
    found = results(row)
    for name, value in results(batch).items():
        assert torch.equal(found[name].reshape(value.shape), value), name


def attend(case, cu_seqlens: Tensor | None, at: slice | None = None) -> dict[str, Tensor]:
    """The output and gradients in float32 of the packed row, or of one document alone."""
    leaves, options = case.tensors(torch.float32), dict(case.options, backend="native", cu_seqlens=cu_seqlens)
    options["bias"] = leaves.get("bias")
    rows, grad = [leaves[name] for name in "qkv"], torch.linspace(-1, 1, case.q.shape[2] * 8).view(1, 1, -1, 8)
    grad = grad[..., : case.v.shape[-1]]
    if at is not None:
        rows, grad = [x[:, :, at] for x in rows], grad[:, :, at]
        if options["key_padding_mask"] is not None:
            options["key_padding_mask"] = options["key_padding_mask"][:, at]
    out = ops.vq_attention(*rows, case.codebook.float(), **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.expand_as(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@given(attention_cases(max_length=300, packed=True))
@settings(max_examples=60)
def test_attention_gives_each_document_the_bits_that_it_gets_alone(case):
    cu_seqlens = case.options["cu_seqlens"]
    whole = attend(case, cu_seqlens)
    sums = {}
    for at in spans(cu_seqlens):
        single = attend(case, None, at)
        assert torch.equal(single.pop("out"), whole["out"][:, :, at])
        for name, value in single.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    for name, total in sums.items():
        if total.numel():
            error = (whole[name] - total).abs().max()
            assert error <= 1e-5 * (1 + total.abs().max()), (name, float(error))


@given(attention_cases(max_length=300, packed=True))
@settings(max_examples=10)
def test_any_number_of_threads_gives_the_same_bits_of_attention(case):
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(attend(case, case.options["cu_seqlens"]))
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


U, MODES = torch.zeros(1, 5, 3), torch.zeros(3, 4)
RIGHT = torch.tensor([0, 2, 5], dtype=torch.int32)
BAD = {
    "int64": RIGHT.long(),
    "float": RIGHT.float(),
    "rank": RIGHT[None],
    "no offset": RIGHT[:0],
    "first": RIGHT + 1,
    "beyond": RIGHT * 2,
    "short": RIGHT[:2],
    "falling": torch.tensor([0, 6, 5], dtype=torch.int32),
    "negative": torch.tensor([0, -3, 5], dtype=torch.int32),
}


def scan_both(u: Tensor, states: int, offsets: Tensor, start: Tensor | None = None) -> None:
    torch.ops.longvq.ssm_scan(u, MODES, MODES, None, start, None, offsets, False)
    grad_state = torch.zeros(states, 3, 4)
    torch.ops.longvq.ssm_scan_backward(u, grad_state, u, MODES, MODES, None, start, None, offsets, False, True, True)


@pytest.mark.parametrize("name", BAD)
def test_the_kernel_itself_refuses_offsets_that_would_read_out_of_bounds(name):
    scan_both(U, 2, RIGHT)
    scan_both(U, 2, torch.tensor([0, 9, 2, 9, 5, 9], dtype=torch.int32)[::2])  # with a stride
    offsets = BAD[name]
    arguments = (U, MODES, MODES, None, None, None, offsets, False)
    with pytest.raises(RuntimeError, match="ssm_scan: cu_seqlens must"):
        torch.ops.longvq.ssm_scan(*arguments)
    with pytest.raises(RuntimeError, match="ssm_scan: cu_seqlens must"):
        torch.ops.longvq.ssm_scan_backward(U, torch.zeros(2, 3, 4), *arguments, True, True)


def test_the_kernel_itself_refuses_states_that_are_not_one_for_each_document():
    for wrong in (1, 3):
        with pytest.raises(RuntimeError, match=r"grad_state must be \(rows or documents, H, N\)"):
            scan_both(U, wrong, RIGHT)
        with pytest.raises(RuntimeError, match=r"initial_state must be \(rows or documents, H, N\)"):
            scan_both(U, 2, RIGHT, torch.zeros(wrong, 3, 4))
    with pytest.raises(RuntimeError, match=r"cu_seqlens must .* batch of 1"):
        scan_both(U.expand(2, 5, 3), 2, RIGHT)
