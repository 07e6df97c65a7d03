"""Two data-parallel ranks learn one codebook, even if one of them has no keys."""

import copy
import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longvq_layers.layers import Codebook, VQAttention, commitment_loss

STEPS = 12


def batch(rank, step):
    """Keys (B, H, L, D) and mask of a rank. Lengths differ, and in some steps a rank has no key at all."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    length = 20 + 7 * rank + step
    k = torch.randn(3, 2, length, 4, generator=generator) + 4 * rank + (30 if step >= 4 else 0)
    mask = torch.rand(3, length, generator=generator) < 0.3
    if (step, rank) in ((0, 0), (5, 1)) or step == 6:
        mask[:] = True
    if (step, rank) == (7, 1):
        k, mask = k[:0], mask[:0]
    return k, mask


def rank_main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{os.path.join(folder, 'store')}"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    torch.manual_seed(rank)
    book, one_sided = Codebook(2, 6, 4, revive_after=3), Codebook(2, 6, 4, revive_after=3)
    history = []
    for step in range(STEPS):
        book(*batch(rank, step))
        history.append({name: value.clone() for name, value in book.state_dict().items()})
    for step in range(STEPS):
        k, mask = batch(0, step + 1)
        one_sided(k, mask if rank == 0 else torch.ones_like(mask))  # rank 1 never has a key
    history.append({name: value.clone() for name, value in one_sided.state_dict().items()})
    alone = dist.new_group([0]), dist.new_group([1])
    private = Codebook(2, 6, 4, process_group=alone[rank])
    assert copy.deepcopy(private).group.group is alone[rank]
    if rank == 0:
        private(*batch(0, 1))  # a group of one rank: it must not wait for the other rank

    torch.manual_seed(0)
    layer = torch.nn.parallel.DistributedDataParallel(VQAttention(8, 2, num_codes=4, window=2))
    torch.manual_seed(rank)
    for _ in range(3):
        (layer(torch.randn(2, 20, 8)).square().mean() + commitment_loss(layer)).backward()
    history.append({name: value.clone() for name, value in layer.module.state_dict().items()})
    torch.save(history, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs a POSIX loopback here")
def test_two_ranks_learn_one_codebook(tmp_path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        for name in one:
            assert torch.equal(one[name], other[name]), (step, name)
    assert bool(first[0]["initialized"])  # although rank 0 had no keys in step 0
    assert not torch.equal(first[5]["ema_sum"], first[4]["ema_sum"])
    assert torch.equal(first[6]["ema_sum"], first[5]["ema_sum"])  # no rank had keys
    # Dead codes were revived with the same keys on both ranks, even if one rank has no key to give.
    for state in first[STEPS - 1 : STEPS + 1]:
        assert ((state["embedding"].mean(-1) - 32).abs() < 6).all()
    for state in first[:STEPS]:
        assert (state["ema_sum"] / state["ema_count"].unsqueeze(-1)).abs().max() < 45

    # One process with the keys of both ranks computes the same averages.
    book = Codebook(2, 6, 4, revive_after=None)
    book.load_state_dict(first[0])
    codes_of = [batch(rank, 1) for rank in range(2)]
    width = max(k.shape[2] for k, _ in codes_of)
    keys = torch.cat([torch.nn.functional.pad(k, (0, 0, 0, width - k.shape[2])) for k, _ in codes_of])
    mask = torch.cat([torch.nn.functional.pad(m, (0, width - m.shape[1]), value=True) for _, m in codes_of])
    book(keys, mask)
    for name in ("ema_count", "ema_sum", "ema_error", "ema_energy"):
        assert torch.allclose(getattr(book, name), first[1][name], rtol=1e-4, atol=1e-4), name
