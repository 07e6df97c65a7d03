"""The compiled nearest-codeword kernel against a float64 brute force, on every instruction set of this machine."""

import os
import subprocess
import sys
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from longvq_layers import _extension, ops

CAPABILITIES = ("default", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers of keys per head around 16, the limit between the two kernels, and all group sizes below it.
FEW_AND_MORE = (1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 18, 40)


def native(k: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return ops.vq_assign(k, codebook, backend="native")


def squared_distances(k: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances (B, H, L, S) in float64, by the definition."""
    return (k.double().unsqueeze(-2) - codebook.double()[None, :, None]).square().sum(-1)


def assert_nearest(codes: torch.Tensor, k: torch.Tensor, codebook: torch.Tensor) -> None:
    """The chosen codeword is as near as the nearest codeword, up to the rounding of two float32 scores.

    A score k.C - |C|^2/2 is a chain of D multiply-adds on a start value: its error is at most about
    (D + 2) eps (|k||C| + |C|^2/2). Distances differ by twice the scores, and two scores were compared.
    """
    assert codes.dtype == torch.int64 and codes.shape == k.shape[:3]
    if codes.numel() == 0:
        return
    distances = squared_distances(k, codebook)
    assert codes.min() >= 0 and codes.max() < codebook.shape[1]
    chosen = distances.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    norm_k = k.double().norm(dim=-1)
    norm_c = codebook.double().norm(dim=-1).amax(-1)[None, :, None]
    bound = 4 * (k.shape[-1] + 2) * torch.finfo(torch.float32).eps * (norm_k * norm_c + norm_c.square() / 2)
    assert (chosen - distances.amin(-1) <= bound).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and codebooks of any small shape and dtype, in every memory layout that views can have."""
    b, h, length = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 130) | st.integers(0, 9))
    codes, head_dim = draw(st.integers(1, 150)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e3]))
    k = _laid_out(draw, (b, h, length, head_dim), 1.0, generator)
    return k, _laid_out(draw, (h, codes, head_dim), scale, generator)


def _laid_out(draw: st.DrawFn, shape: tuple[int, ...], scale: float, generator: torch.Generator) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))

    def randn(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    layout = draw(st.sampled_from(["contiguous", "permuted", "strided", "offset", "expanded"]))
    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        return randn(*(shape[i] for i in order)).permute([order.index(i) for i in range(len(shape))])
    if layout == "strided":
        return randn(*(2 * n for n in shape))[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "offset":
        return randn(*shape[:-1], shape[-1] + 3)[..., 3:]
    if layout == "expanded":
        dim = draw(st.integers(0, len(shape) - 1))
        return randn(*(1 if i == dim else n for i, n in enumerate(shape))).expand(shape)
    return randn(*shape)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_finds_a_nearest_code_in_any_layout_and_type(problem):
    k, codebook = problem
    codes = native(k, codebook)
    assert_nearest(codes, k, codebook)
    # Half precision is converted to float32 without error, and all arithmetic is in float32.
    assert torch.equal(codes, native(k.float(), codebook.float()))


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_exact_ties_go_to_the_lowest_code(problem, data):
    """Small integers make every score exact, so equal distances are equal scores."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    k, codebook = (x.round().clamp(-8, 8) for x in problem)
    drawn = torch.randint(codebook.shape[1], (data.draw(st.integers(1, 200)),), generator=generator)
    codebook = codebook[:, drawn]  # with duplicates
    codes = native(k, codebook)
    assert_nearest(codes, k, codebook)
    if codes.numel():
        distances = squared_distances(k, codebook)
        chosen = distances.gather(-1, codes.unsqueeze(-1))
        assert torch.equal(chosen.squeeze(-1), distances.amin(-1))
        lower = torch.arange(distances.shape[-1]) < codes.unsqueeze(-1)
        assert not ((distances == chosen) & lower).any()


@pytest.mark.parametrize("codes", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("head_dim", [33, 64])
def test_identical_codewords_give_the_first(codes, head_dim):
    torch.manual_seed(codes)
    codebook = torch.randn(3, 1, head_dim).expand(3, codes, head_dim)
    for rows in FEW_AND_MORE:
        k = torch.randn(1, 3, rows, head_dim)
        assert native(k, codebook).eq(0).all()
        assert native(k, codebook.contiguous()).eq(0).all()


@pytest.mark.parametrize("rows", FEW_AND_MORE)
def test_a_few_keys_get_a_nearest_code(rows):
    torch.manual_seed(rows)
    for codes, head_dim in [(1, 8), (6, 64), (97, 40), (512, 64), (30, 1)]:
        k, codebook = torch.randn(1, 2, rows, head_dim), torch.randn(2, codes, head_dim)
        codes = native(k, codebook)
        assert_nearest(codes, k, codebook)
        assert torch.equal(native(k.permute(2, 1, 0, 3), codebook), codes.permute(2, 1, 0))  # rows along the batch


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codes", [1, 5, 64, 100])
@pytest.mark.parametrize("length", [3, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_is_not_finite_gets_code_zero_and_disturbs_no_other(bad, codes, length, dtype):
    torch.manual_seed(0)
    k, codebook = torch.randn(2, 2, length, 19).to(dtype), torch.randn(2, codes, 19)
    expected = native(k, codebook)
    k[1, 0, 1, 3] = bad
    k[0, 1, length - 1] = bad
    expected[1, 0, 1] = expected[0, 1, length - 1] = 0
    assert torch.equal(native(k, codebook), expected)


@pytest.mark.parametrize("heads", [1, 1024])
def test_subnormal_halves_count_where_the_caller_has_denormals_flushed(heads):
    k = (torch.arange(1024) * 2.0**-24).to(torch.float16).view(1, heads, 1024 // heads, 1)
    codebook = (torch.arange(64) * 2.0**-20).view(1, 64, 1).expand(heads, 64, 1)
    expected = squared_distances(k, codebook).argmin(-1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        assert torch.equal(native(k, codebook), expected)
    finally:
        torch.set_flush_denormal(False)


def test_overflowing_scores_stay_in_range():
    torch.manual_seed(0)
    k, codebook = torch.randn(1, 1, 64, 8) * 1e30, torch.randn(1, 37, 8) * 1e30
    codes = native(k, codebook)
    assert codes.min() >= 0 and codes.max() < 37


@pytest.mark.parametrize(
    ("length", "codes", "head_dim"), [(1, 1, 1), (129, 151, 64), (150, 512, 128), (37, 48, 257), (11, 2, 1000)]
)
def test_odd_sizes(length, codes, head_dim):
    torch.manual_seed(0)
    k, codebook = torch.randn(1, 2, length, head_dim), torch.randn(2, codes, head_dim)
    assert_nearest(native(k, codebook), k, codebook)


@pytest.mark.parametrize("sizes", [(1, 2, 3, 4, 7, 8, 16), (17, 18, 40, 101)])
def test_company_does_not_change_a_code(sizes):
    """The number of keys, blocks, remainders and the batch size don't change any code, not even of near ties."""
    torch.manual_seed(0)
    k, codebook = torch.randn(2, 101, 24).bfloat16().float(), torch.randn(2, 90, 24)
    codebook[:, 45:] = codebook[:, :45] * (1 + 1e-7)
    results = []
    for size in sizes:  # every key in a call with `size` keys, the last keys together with the keys before them
        codes = torch.empty(2, 101, dtype=torch.int64)
        for start in range(0, 101, size):
            part = slice(min(start, 101 - size), min(start, 101 - size) + size)
            codes[:, part] = native(k[None, :, part], codebook)[0]
        results.append(codes)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_nearest(results[0][None], k[None], codebook)


@pytest.mark.parametrize(("heads", "length", "dtype"), [(3, 1500, torch.float32), (64, 4, torch.bfloat16)])
def test_threads_change_nothing(heads, length, dtype):
    torch.manual_seed(0)
    k, codebook = torch.randn(2, heads, length, 40).to(dtype), torch.randn(heads, 400, 40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(native(k, codebook))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_several_python_threads_at_once():
    torch.manual_seed(0)
    inputs = [(torch.randn(1, 2, 700, 16), torch.randn(2, 64, 16)) for _ in range(4)]
    expected = [native(*pair) for pair in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.equal(native(*inputs[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("k", "codebook", "message"),
    [
        (torch.zeros(1, 1, 2), torch.zeros(1, 2, 3), "k must be \\(B, H, L, D\\), got 3 dimensions"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(2, 3), "codebook must be \\(H, S, D\\), got 2 dimensions"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(2, 2, 3), "codebook must be .*, got \\(2, 2, 3\\)"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 4), "codebook must be .*, got \\(1, 2, 4\\)"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(1, 0, 3), "at least one code"),
        (torch.zeros(1, 1, 2, 3).double(), torch.zeros(1, 2, 3), "must be float32, bfloat16 or float16"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3).double(), "must be float32, bfloat16 or float16"),
        (torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3).long(), "must be float32, bfloat16 or float16"),
    ],
)
def test_the_kernel_itself_refuses_what_would_read_out_of_bounds(k, codebook, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.longvq.vq_assign(k, codebook)


_DUMP = """
import sys, torch
import longvq_layers
from longvq_layers import _extension, ops
assert _extension.is_loaded(), _extension.load_error()
problems = torch.load(sys.argv[1])
torch.save((_extension.cpu_capability(), [ops.vq_assign(k, c, backend="native") for k, c in problems]), sys.argv[2])
"""


@pytest.mark.slow
def test_every_instruction_set_finds_a_nearest_code(tmp_path):
    """Instruction sets may give different codes only where both codewords are nearest up to rounding."""
    torch.manual_seed(0)
    shapes = [(1, 1, 1, 1, 1), (2, 3, 77, 130, 33), (1, 2, 300, 512, 64), (1, 1, 9, 31, 300), (1, 2, 7, 130, 64)]
    problems = [(torch.randn(b, h, n, d), torch.randn(h, s, d)) for b, h, n, s, d in shapes]
    problems += [(k.to(dtype), codebook) for k, codebook in problems for dtype in DTYPES[1:]]
    tied = torch.randint(-2, 3, (1, 1, 200, 3)).float(), torch.randint(-1, 2, (1, 100, 3)).float()
    torch.save([*problems, tied], tmp_path / "problems.pt")

    best = CAPABILITIES.index(_extension.cpu_capability() or "default")
    for capability in CAPABILITIES[: best + 1]:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", _DUMP, tmp_path / "problems.pt", tmp_path / "codes.pt"],
            env={**os.environ, "LONGVQ_CPU_CAPABILITY": capability},
            check=True,
        )
        used, results = torch.load(tmp_path / "codes.pt")
        assert used == capability
        for codes, (k, codebook) in zip(results[:-1], problems, strict=True):
            assert_nearest(codes, k, codebook)
        assert torch.equal(results[-1], squared_distances(*tied).argmin(-1))
