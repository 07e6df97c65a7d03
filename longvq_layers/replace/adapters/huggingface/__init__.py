"""Attention modules of transformers that find their attention function in its attention interface.

The name "longvq" is added to transformers' two public registries; nothing in them is changed. A replaced module gets a
slot that holds the codebook, and a copy of its config with `_attn_implementation="longvq"`. If all attention modules
with one config object are replaced, the other modules with this config get the copy too. Then `longvq_mask` makes the
masks in O(B·L). Otherwise the model keeps making dense masks, which every call verifies.
"""
