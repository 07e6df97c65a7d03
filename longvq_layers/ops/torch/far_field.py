"""The far field: sums over the keys that a block of queries attends to through their codes.

Queries are split into blocks of ``T`` rows. Keys within ``reach = W − 1`` of a block are *near*: each gets a score of
its own. All other keys are *far*: a block only needs, for each code, the number of far keys and the sum of their
values. A key far *before* block b is far before every later block, so these are running sums over the blocks. In
bidirectional attention, keys far *after* a block give running sums in the other direction. Nothing is ever subtracted
from a sum: subtraction would lose precision where few keys of a code remain.

Memory: ``S · (E + 1)`` numbers per block and head, which is O(L) because ``T`` is proportional to ``S``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def segment_sum(rows: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum ``rows`` (R, E) by ``segment`` (R,) into (num_segments, E); deterministic on every device."""
    out = rows.new_zeros(num_segments, *rows.shape[1:])
    if rows.is_cuda:  # index_add_ uses atomics, whose order varies; index_put_ sorts first
        return out.index_put_((segment,), rows, accumulate=True)
    return out.index_add_(0, segment, rows)


@dataclass(frozen=True)
class Blocks:
    """The blocks of queries of one call, and which keys are far from which block."""

    length: int
    size: int  # T
    reach: int  # keys further than this from a block are far from all of its queries
    causal: bool
    everything_far: bool  # bidirectional without a window: all blocks share one far field

    @classmethod
    def plan(cls, length: int, num_codes: int, window: int, causal: bool) -> "Blocks":
        everything_far = window == 0 and not causal
        # A block then has about as many near keys as codes. The far fields take about twice the memory of the values.
        size = 512 if everything_far else min(max(num_codes // 2, window, 64), 512)
        return cls(length, max(1, min(size, length)), max(window - 1, 0), causal, everything_far)

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def rows(self, block: int) -> slice:
        return slice(block * self.size, min((block + 1) * self.size, self.length))

    def near(self, block: int) -> slice:
        """The keys that are near this block."""
        if self.everything_far:
            return slice(0, 0)
        rows = self.rows(block)
        stop = rows.stop if self.causal else min(self.length, rows.stop + self.reach)
        return slice(max(0, rows.start - self.reach), stop)

    def first_after(self, device: torch.device) -> Tensor:
        """(L,): for each key the first of the later blocks that it is far from; ``count`` if there is none."""
        j = torch.arange(self.length, device=device)
        return ((j + self.reach) // self.size + 1).clamp_(max=self.count)

    def last_before(self, device: torch.device) -> Tensor:
        """(L,): for each key the last of the earlier blocks that it is far from; −1 if there is none."""
        j = torch.arange(self.length, device=device)
        return torch.div(j - self.reach, self.size, rounding_mode="floor").sub_(1).clamp_(min=-1)


class FarField:
    """Sums rows of keys by block and code, and the adjoint: gathers gradients of these sums back to the keys.

    Both directions take time linear in L: one scatter or gather, and one running sum over the blocks.
    """

    def __init__(self, codes: Tensor, num_codes: int, blocks: Blocks) -> None:
        self.blocks, self.num_codes = blocks, num_codes
        self.heads = codes.shape[0] * codes.shape[1]  # (batch, head) pairs
        self.codes = codes.reshape(self.heads, -1)
        self.slots = 1 if blocks.everything_far else blocks.count + 1
        self._after = None
        if blocks.everything_far:
            self._before = self._segments(torch.zeros(blocks.length, dtype=torch.int64, device=codes.device))
        else:
            self._before = self._segments(blocks.first_after(codes.device))
            if not blocks.causal:
                self._after = self._segments(blocks.last_before(codes.device) + 1)  # block b has slot b + 1

    def _segments(self, slot: Tensor) -> Tensor:
        head = torch.arange(self.heads, device=slot.device)[:, None]
        return ((slot * self.heads + head) * self.num_codes + self.codes).reshape(-1)

    def sums(self, rows: Tensor) -> Tensor:
        """(heads, L, E) -> (blocks, heads, S, E): for each block and code the sum over the far keys."""
        before = self._scatter(rows, self._before)
        if self.blocks.everything_far:
            return before
        for slot in range(1, self.slots):
            before[slot] += before[slot - 1]
        far = before[:-1]
        if self._after is not None:
            after = self._scatter(rows, self._after)
            for slot in range(self.slots - 2, 0, -1):
                after[slot] += after[slot + 1]
            far += after[1:]
        return far

    def gather(self, sums: Tensor) -> Tensor:
        """Adjoint of :meth:`sums`: (blocks, heads, S, E) -> (heads, L, E)."""
        if self.blocks.everything_far:
            return self._gather(sums, self._before)
        empty = sums.new_zeros(1, *sums.shape[1:])
        rows = None
        if self._after is not None:
            after = torch.cat([empty, sums])
            for slot in range(2, self.slots):
                after[slot] += after[slot - 1]
            rows = self._gather(after, self._after)
            del after
        before = torch.cat([sums, empty])
        for slot in range(self.slots - 3, -1, -1):
            before[slot] += before[slot + 1]
        before = self._gather(before, self._before)
        return before if rows is None else rows.add_(before)

    def _scatter(self, rows: Tensor, segment: Tensor) -> Tensor:
        width = rows.shape[-1]
        flat = segment_sum(rows.reshape(-1, width), segment, self.slots * self.heads * self.num_codes)
        return flat.view(self.slots, self.heads, self.num_codes, width)

    def _gather(self, slots: Tensor, segment: Tensor) -> Tensor:
        width = slots.shape[-1]
        return slots.reshape(-1, width).index_select(0, segment).view(self.heads, self.blocks.length, width)
