"""The context of a forward: its cache is used once, its positions in every attention of the forward."""

import pytest
import torch

from longvq_layers.replace.slot.context import ForwardContext, claim_context, store_context


def test_a_second_attention_has_the_positions_of_the_first_and_no_cache():
    slot = torch.nn.Module()
    slot.contexts = {}
    rotation = (torch.ones(1), torch.zeros(1))
    store_context(slot, ForwardContext(rotation, None))
    assert [claim_context(slot).rotation for _ in range(2)] == [rotation] * 2
    store_context(slot, ForwardContext(rotation, object()))
    claim_context(slot)
    with pytest.raises(NotImplementedError, match="attends more than once"):
        claim_context(slot)
