"""K-means: finds clusters, is reproducible, and stays finite with few or equal keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers.layers.codebook.kmeans import kmeans
from longvq_layers.layers.codebook.operations import code_sums, draw, spread


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def error(keys, codebook):
    return torch.cdist(keys, codebook).min(-1).values.square().mean()


def test_finds_separated_clusters():
    centres = 10 * torch.randn(2, 12, 5)
    keys = centres.repeat_interleave(20, dim=1) + 0.01 * torch.randn(2, 240, 5)
    codebook = kmeans(keys, 12, generator=seeded())
    assert torch.cdist(centres, codebook).min(-1).values.max() < 0.05
    assert error(keys, codebook) < 1e-3


def test_is_better_than_random_keys_and_improves_with_iterations():
    keys = torch.randn(3, 500, 4)
    fitted = error(keys, kmeans(keys, 16, generator=seeded()))
    assert fitted < 0.8 * error(keys, keys[:, :16])
    assert fitted < 0.9 * error(keys, kmeans(keys, 16, iterations=0, generator=seeded()))


def test_start_is_spread_by_squared_distance():
    # 500 keys at 0 and one far away: k-means++ always takes it second, a uniform start almost never.
    keys = torch.zeros(1, 501, 2)
    keys[0, 250] = 100.0
    for seed in range(5):
        assert kmeans(keys, 2, iterations=0, generator=seeded(seed)).max() == 100


def test_is_reproducible():
    keys = torch.randn(2, 100, 3)
    assert torch.equal(kmeans(keys, 8, generator=seeded(5)), kmeans(keys, 8, generator=seeded(5)))
    assert not torch.equal(kmeans(keys, 8, generator=seeded(5)), kmeans(keys, 8, generator=seeded(6)))


def test_codes_that_lose_their_keys_move_to_far_keys():
    from longvq_layers.layers.codebook.kmeans import _lloyd

    keys = torch.tensor([[[0.0], [0.2], [7.0], [9.0]]])
    moved = _lloyd(keys, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[[0.0], [50.0], [60.0]]]))
    assert moved.flatten().tolist() == [pytest.approx(4.05), 9.0, 7.0]


def test_an_offset_of_all_keys_costs_no_precision():
    keys = torch.randn(1, 200, 4, dtype=torch.float64)
    plain = kmeans(keys, 8, generator=seeded())
    shifted = kmeans(keys + 100, 8, generator=seeded()) - 100
    assert torch.allclose(plain, shifted, atol=1e-6)


@settings(max_examples=40)
@given(
    heads=st.integers(1, 3),
    count=st.integers(0, 12),
    num_codes=st.integers(1, 9),
    distinct=st.integers(1, 4),
    scale=st.sampled_from([1e-20, 1.0, 1e6]),
    mask=st.sampled_from(["none", "shared", "per head"]),
)
def test_any_number_of_keys_and_duplicates(heads, count, num_codes, distinct, scale, mask):
    torch.manual_seed(count)
    table = torch.randn(heads, distinct, 3) * scale
    keys = table[:, torch.arange(count) % distinct]
    ignore = None if mask == "none" else torch.rand(count) < 0.4 if mask == "shared" else torch.rand(heads, count) < 0.4
    valid = torch.ones(heads, count, dtype=torch.bool) if ignore is None else ~ignore.expand(heads, count)
    keys = torch.where(valid.unsqueeze(-1), keys, torch.nan)
    codebook = kmeans(keys, num_codes, mask=ignore, generator=seeded())
    assert codebook.shape == (heads, num_codes, 3)
    assert codebook.isfinite().all()
    start = kmeans(keys, num_codes, mask=ignore, iterations=0, generator=seeded())
    for head in range(heads):
        real = keys[head][valid[head]]
        if not len(real):
            assert (codebook[head] == 0).all()
            continue
        assert (start[head][:, None] == real).all(-1).any(-1).all()  # every code starts as an unmasked key
        if len(real.unique(dim=0)) <= num_codes:  # enough codes: each key has its own, however small the differences
            assert error(real.double()[None], codebook[head].double()[None]) <= (1e-5 * scale) ** 2


def test_wrong_arguments_are_named():
    keys = torch.randn(2, 10, 3)
    with pytest.raises(ValueError, match=r"kmeans: keys must have 3 dimensions \(H, N, D\), got 2: \(10, 3\)"):
        kmeans(keys[0], 2)
    with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
        kmeans(keys, 0)
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        kmeans(keys, 2, iterations=-1)
    with pytest.raises(ValueError, match=r"mask must have shape \(10,\) or \(2, 10\), got \(9,\)"):
        kmeans(keys, 2, mask=torch.zeros(9, dtype=torch.bool))


def test_draw_follows_the_weights():
    weight = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    index = draw(weight, torch.rand(2, 4000, dtype=torch.float64, generator=seeded()))
    assert set(index[0].tolist()) == {1, 3}
    assert abs((index[0] == 3).double().mean() - 0.75) < 0.03
    assert ((index[1] >= 0) & (index[1] < 5)).all()


def test_spread_covers_the_unit_interval_evenly():
    for step in (0, 7, 3_000_000):
        numbers = spread(3, 200, torch.tensor(step))
        assert numbers.dtype == torch.float64 and ((numbers >= 0) & (numbers < 1)).all()
        # Each twentieth of the interval gets about ten of the 200 numbers.
        assert all((row.histc(20, 0, 1) - 10).abs().max() <= 4 for row in numbers)
    over_time = torch.stack([spread(1, 5, torch.tensor(3_000_000 + step)) for step in range(200)])  # (steps, 1, 5)
    assert all((code.histc(20, 0, 1) - 10).abs().max() <= 4 for code in over_time[:, 0].T.contiguous())


def test_code_sums():
    keys, codes = torch.randn(2, 30, 3), torch.randint(4, (2, 30))
    valid = torch.rand(2, 30) < 0.7
    sums, counts = code_sums(keys, codes, valid, 4)
    for head in range(2):
        for code in range(4):
            mine = keys[head][(codes[head] == code) & valid[head]]
            assert counts[head, code] == len(mine)
            assert torch.allclose(sums[head, code], mine.sum(0), atol=1e-5)
