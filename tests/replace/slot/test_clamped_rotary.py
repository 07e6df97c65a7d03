"""Queries and keys without their positions, against the definition."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from tests.tolerances import assert_close


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_scaled_rotations_scale_far_scores_like_near_ones(scale):
    """Some models scale cos and sin by s, and with them every score by s²."""
    angles = torch.rand(8, dtype=torch.float64).repeat(2)  # of one step, the same for both halves

    def rotation(positions):
        turned = positions.double()[:, None] * angles
        return scale * turned.cos().unsqueeze(0), scale * turned.sin().unsqueeze(0)

    positions, window = torch.arange(30), torch.tensor([6])
    rotary = ClampedRotary(apply_rotary_pos_emb, *(x[0, 0] for x in rotation(window)))
    q, k = torch.randn(2, 1, 3, 30, 16, dtype=torch.float64).unbind(0)
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *rotation(positions))
    assert rotary.detect_rotated_columns(turned_k, k, *rotation(positions)) and rotary.part == "all"
    far_q, far_k = rotary(turned_q, turned_k, *rotation(positions))
    clamped = apply_rotary_pos_emb(q, q, *rotation(window.expand(30)))[0]  # s R(W) q
    assert_close(far_q @ far_k.mT, scale * clamped @ k.mT, "far scores")
