"""The sizes and inputs of the benchmark of attention, and the calls that it times.

q, k, v and the codebook are random: the time does not depend on their values. The peer is the fused
`torch.nn.functional.scaled_dot_product_attention` on the same q, k, v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.benchmarks.common.timing import Calls


@dataclass(frozen=True)
class Form:
    """Bidirectional or causal attention."""

    name: str
    causal: bool
    window: int  # in positions, with a learned bias if above 0


@dataclass(frozen=True)
class Sizes:
    """Every size of a run."""

    num_heads: int = 8
    head_dim: int = 64  # of keys and of values
    num_codes: int = 512
    window: int = 128  # of the causal form
    forward: tuple[int, ...] = (4096, 16384)  # lengths of the case "forward"
    long: int = 16384  # length of all other cases
    sweep: tuple[int, ...] = tuple(2**power for power in range(9, 18))  # 512 … 131,072
    positions: tuple[int, ...] = (1024, 16384, 131072)  # tokens before the decoded one
    tokens: int = 100  # decoded in a round
    cache: int = 16384  # keys of the peer when it decodes
    matmul: int = 2048  # width of the square matrices whose product gives the machine's rate

    @property
    def forms(self) -> tuple[Form, Form]:
        return Form("bidirectional", False, 0), Form("causal", True, self.window)


FULL = Sizes()
QUICK = Sizes(2, 16, 32, 8, (64, 256), 256, (64, 128, 256, 512), (16, 64), 5, 256, 64)


class Problem:
    """One form of attention at one length.

    Args:
        sizes: of heads and codebook.
        form: bidirectional or causal.
        length: L.
        backend: of ours.
        dtype: of q, k and v.
    """

    def __init__(self, sizes: Sizes, form: Form, length: int, backend: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = 1, sizes.num_heads, length, sizes.head_dim
        self.form, self.backend = form, backend
        self.q, self.k, self.v, self.grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        self.codebook = torch.randn(sizes.num_heads, sizes.num_codes, sizes.head_dim, generator=generator)
        self.bias = torch.randn(sizes.num_heads, form.window, generator=generator) if form.window else None

    def ours(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, codes: Tensor | None = None
    ) -> Tensor:
        """Attention over quantised keys; without `codes` it assigns the keys to codes as well."""
        return ops.vq_attention(
            q,
            k,
            v,
            self.codebook,
            bias=bias,
            codes=codes,
            backend=self.backend,
            causal=self.form.causal,
            window=self.form.window,
        )

    def leaves(self) -> list[Tensor]:
        """q, k, v and, where there is one, the bias, as new tensors that need gradients. The peer has no bias."""
        return [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v, self.bias) if x is not None]

    def forward(self) -> Calls:
        return {
            "ours": lambda: self.ours(self.q, self.k, self.v, self.bias),
            "sdpa": lambda: sdpa(self.q, self.k, self.v, is_causal=self.form.causal),
        }

    def forward_and_backward(self) -> Calls:
        leaves = self.leaves()
        q, k, v = leaves[:3]
        return {
            "ours": lambda: torch.autograd.grad(self.ours(*leaves), leaves, self.grad),
            "sdpa": lambda: torch.autograd.grad(sdpa(q, k, v, is_causal=self.form.causal), [q, k, v], self.grad),
        }

    def parts(self) -> Calls:
        """The parts of our forward and backward. The graph of "backward" is made here and kept."""
        codes = ops.vq_assign(self.k, self.codebook, backend=self.backend)
        q, k, v, *bias = leaves = self.leaves()
        out = self.ours(q, k, v, *bias, codes=codes)
        return {
            "assignment": lambda: ops.vq_assign(self.k, self.codebook, backend=self.backend),
            "forward, codes given": lambda: self.ours(self.q, self.k, self.v, self.bias, codes=codes),
            "backward": lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True),
        }
