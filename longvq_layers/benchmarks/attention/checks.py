"""Proof that ours computes attention over the quantised keys, before anything is timed.

The peer attends to the keys, ours to their codewords. So, at a short length, the check gives the codewords to the peer
as keys, and both must give the same result.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.benchmarks.attention.problem import Form, Problem, Sizes

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest value; bfloat16 has 8 bits
_CHECKED_LENGTH = 512


def check(sizes: Sizes, form: Form, backend: str, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference of ours from the peer over out, dq, dv and dbias, each relative to its largest value.

    The peer has no gradient of k to compare: ours is straight-through, shared among the keys of a code.

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
    mask = _dense_bias(form.window, exact[3], q.shape[2]) if form.causal else None
    out = sdpa(exact[0], keys, exact[2], attn_mask=mask)
    peer = [out.detach(), *torch.autograd.grad(out, [exact[0], exact[2], *exact[3:]], problem.grad.double())]
    names = ("out", "dq", "dv", "dbias")
    return max(_compare(*triple, TOLERANCE[dtype]) for triple in zip(names, ours, peer, strict=False))


def _dense_bias(window: int, bias: Tensor, length: int) -> Tensor:
    """(H, L, L) for `attn_mask`: the bias inside the window, 0 for older keys, -inf for later keys."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    near = torch.zeros((), dtype=bias.dtype).where(back >= window, bias[:, back.clamp(0, window - 1)])
    return near.masked_fill(back < 0, float("-inf"))


def _compare(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> float:
    difference = float((ours.double() - peer).abs().max() / peer.abs().max())
    if not difference <= tolerance:  # also for NaN
        raise AssertionError(
            f"{what}: ours differs from dense attention over the quantised keys by {difference:.2g} of the largest "
            f"value, more than {tolerance:.0e}; a wrong result is not timed"
        )
    return difference
