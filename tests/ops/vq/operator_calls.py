"""Arguments of the operators in `torch.ops`, which tests call without the checks of the public functions."""

from typing import Any

from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import ACTIVATIONS, KEY_GRADS, LOCAL_KEYS, AttentionOptions


def attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    far_q: Tensor | None = None,
    far_k: Tensor | None = None,
    scale: float = 0.5,
    causal: bool = False,
    window: int = 2,
    activation: str = "softmax",
    local_keys: str = "exact",
    key_grad: str = "cluster",
) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.longvq.vq_attention``, with choices by name."""
    inputs = AttentionInputs(q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, far_q, far_k)
    options = AttentionOptions(
        scale,
        causal=causal,
        window=window,
        activation=ACTIVATIONS.index(activation),
        local_keys=LOCAL_KEYS.index(local_keys),
        key_grad=KEY_GRADS.index(key_grad),
    )
    return *inputs, *options
