"""Makes `attn_implementation="longvq"` known to transformers."""

from longvq_layers.replace.adapters.huggingface.attention import longvq_attention
from longvq_layers.replace.adapters.huggingface.masks import longvq_mask
from longvq_layers.replace.adapters.huggingface.support import IMPLEMENTATION


def register_attn_implementation() -> None:
    """Make ``attn_implementation="longvq"`` known to transformers, with the mask function that keeps it causal.

    Use it for models that are trained with quantised keys from the start. Such a model gets its codebooks on the first
    call in training mode, and learns its codes from then on. Its options are num_codes, window, local_keys,
    variance_correction and backend of `replace_attention`, as a dict in the config: ``config.longvq = {"num_codes":
    128}``. The config is saved with the model. Codes are saved too; `load_replaced` loads them. To evaluate a trained
    model that has no codes yet, call `replace_attention(model, calibration=...)`. Rotary keys keep their positions
    (``far_positions="rotated"``).

    Raises:
        ImportError: transformers isn't installed.

    Example:
        >>> import torch
        >>> from transformers import AutoModel, GPT2Config
        >>> register_attn_implementation()
        >>> config = GPT2Config(n_embd=32, n_head=4, n_layer=2, longvq={"num_codes": 16, "window": 8})
        >>> model = AutoModel.from_config(config, attn_implementation="longvq").train()
        >>> model(torch.randint(100, (2, 60))).last_hidden_state.shape
        torch.Size([2, 60, 32])
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, longvq_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, longvq_mask)
