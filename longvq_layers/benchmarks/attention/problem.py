"""Inputs and calls of the benchmark of attention, and the proof that they compute what is claimed.

Random q, k, v and codebook: the time does not depend on the values. Peer: fused
`torch.nn.functional.scaled_dot_product_attention` on the same q, k, v; it attends to the keys themselves, ours to their
codewords. So equality is proved at a short length on the quantised keys, where the peer has to give ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.ops._dispatch import choose

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest value; bfloat16 has 8 bits
_CHECKED_LENGTH = 512
_TILE = 256  # rows; their scores of one head fit into an L2 cache
_TILES_PER_CALL = 4  # one alone is too short for the clock


@dataclass(frozen=True)
class Form:
    name: str
    causal: bool
    window: int  # with a learned bias where it is not 0


@dataclass(frozen=True)
class Sizes:
    heads: int = 8
    width: int = 64  # of keys and of values
    codes: int = 512
    window: int = 128  # of the causal form
    forward: tuple[int, ...] = (4096, 16384)
    long: int = 16384  # of all other cases
    sweep: tuple[int, ...] = tuple(2**power for power in range(9, 18))  # 512 … 131,072
    positions: tuple[int, ...] = (1024, 16384, 131072)  # tokens before the decoded one
    tokens: int = 100  # decoded in a round
    cache: int = 16384  # keys of the peer
    matmul: int = 2048

    @property
    def forms(self) -> tuple[Form, Form]:
        return Form("bidirectional", False, 0), Form("causal", True, self.window)


FULL = Sizes()
QUICK = Sizes(2, 16, 32, 8, (64, 256), 256, (64, 128, 256, 512), (16, 64), 5, 256, 64)

Calls = dict[str, Callable[[], object]]


class Problem:
    """One form at one length, "ours" and "sdpa" in every group of calls."""

    def __init__(self, sizes: Sizes, form: Form, length: int, backend: str, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        shape = 1, sizes.heads, length, sizes.width
        self.form, self.backend = form, backend
        self.q, self.k, self.v, self.grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        self.codebook = torch.randn(sizes.heads, sizes.codes, sizes.width, generator=generator)
        self.bias = torch.randn(sizes.heads, form.window, generator=generator) if form.window else None
        self.options = {"causal": form.causal, "window": form.window}

    def ours(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
        """The assignment is part of it unless the codes are given."""
        return ops.vq_attention(q, k, v, self.codebook, bias=bias, codes=codes, backend=self.backend, **self.options)

    def leaves(self) -> list[Tensor]:
        """Those of ours; the peer has no bias."""
        return [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v, self.bias) if x is not None]

    def forward(self) -> Calls:
        return {
            "ours": lambda: self.ours(self.q, self.k, self.v, self.bias),
            "sdpa": lambda: sdpa(self.q, self.k, self.v, is_causal=self.form.causal),
        }

    def forward_and_backward(self) -> Calls:
        leaves = self.leaves()
        return {
            "ours": lambda: torch.autograd.grad(self.ours(*leaves), leaves, self.grad),
            "sdpa": lambda: torch.autograd.grad(sdpa(*leaves[:3], is_causal=self.form.causal), leaves[:3], self.grad),
        }

    def parts(self) -> Calls:
        """Of ours: what forward and backward consist of. The graph of "backward" is made here and kept."""
        codes = ops.vq_assign(self.k, self.codebook, backend=self.backend)
        leaves = self.leaves()
        out = self.ours(*leaves, codes=codes)
        return {
            "assignment": lambda: ops.vq_assign(self.k, self.codebook, backend=self.backend),
            "forward, codes given": lambda: self.ours(self.q, self.k, self.v, self.bias, codes),
            "backward": lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True),
        }


def ceilings(sizes: Sizes, like: Tensor) -> Calls:
    """What the machine can do: one large product, scores of tiles that stay in the cache, a copy of q."""
    square = torch.randn(sizes.matmul, sizes.matmul)
    rows = torch.randn(sizes.heads, _TILE, sizes.width)
    codebook = torch.randn(sizes.heads, sizes.width, sizes.codes)
    scores = torch.empty(sizes.heads, _TILE, sizes.codes)
    copy = torch.empty_like(like)

    def tiles():
        for _ in range(_TILES_PER_CALL):
            torch.bmm(rows, codebook, out=scores)

    return {"matmul": lambda: square @ square, "tiles": tiles, "copy": lambda: copy.copy_(like)}


def ceiling_work(sizes: Sizes, like: Tensor) -> dict[str, tuple[float | None, float | None]]:
    """Floating point operations and bytes of each of `ceilings`."""
    tiles = 2 * _TILES_PER_CALL * sizes.heads * _TILE * sizes.width * sizes.codes
    return {"matmul": (2 * sizes.matmul**3, None), "tiles": (tiles, None), "copy": (None, 2 * like.nbytes)}


def served_by(op: str, backend: str, dtype: torch.dtype) -> str:
    return choose(op, backend, torch.device("cpu"), (dtype,))


def backward_served_by(backend: str, dtype: torch.dtype) -> str:
    """Of forward + backward; backward falls back to PyTorch by itself where the library has no kernel for it."""
    served = served_by("vq_attention", backend, dtype)
    native = torch._C._dispatch_has_kernel_for_dispatch_key("longvq::vq_attention_backward", "CPU")
    return "native, backward torch" if served == "native" and not native else served


def check(sizes: Sizes, form: Form, backend: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of ours (out, dq, dv, dbias) from the peer on the quantised keys, relative to the largest.

    The gradient of k has no counterpart: it is straight-through, shared among the keys of a code.

    Raises:
        AssertionError: a difference is beyond `TOLERANCE`.
    """
    problem = Problem(sizes, form, min(_CHECKED_LENGTH, sizes.long), backend, dtype)
    q, k, v, *bias = leaves = problem.leaves()
    out = problem.ours(*leaves)
    ours = [out.detach(), *torch.autograd.grad(out, [q, v, *bias], problem.grad)]

    exact = [x.detach().double().requires_grad_() for x in leaves]
    codes = ops.vq_assign(k, problem.codebook, backend=backend)  # checked by the case "assign"
    keys = torch.stack([words[z] for words, z in zip(problem.codebook, codes[0], strict=True)])[None].double()
    out = sdpa(exact[0], keys, exact[2], attn_mask=_dense_bias(form, exact[3] if bias else None, q.shape[2]))
    peer = [out.detach(), *torch.autograd.grad(out, [exact[0], exact[2], *exact[3:]], problem.grad.double())]
    names = ("out", "dq", "dv", "dbias")
    return max(_compare(*triple, TOLERANCE[dtype]) for triple in zip(names, ours, peer, strict=False))


def _dense_bias(form: Form, bias: Tensor | None, length: int) -> Tensor | None:
    """(H, L, L) for `attn_mask`: the bias inside the window, 0 farther back, -inf ahead."""
    if not form.causal:
        return None
    back = torch.arange(length)[:, None] - torch.arange(length)
    near = torch.zeros((), dtype=bias.dtype).where(back >= form.window, bias[:, back.clamp(0, form.window - 1)])
    return near.masked_fill(back < 0, float("-inf"))


def _compare(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> float:
    difference = float((ours.double() - peer).abs().max() / peer.abs().max())
    if not difference <= tolerance:  # also for NaN
        raise AssertionError(
            f"{what}: ours differs from dense attention over the quantised keys by {difference:.2g} of the largest "
            f"value, more than {tolerance:.0e}; a wrong result is not timed"
        )
    return difference
