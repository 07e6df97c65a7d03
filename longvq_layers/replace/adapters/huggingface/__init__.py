"""Transformers models that look their attention up in transformers' attention interface.

The name "longvq" is added to transformers' two public registries; nothing in them is changed. A replaced module gets a
copy of its config with `_attn_implementation="longvq"` and a slot that holds the codebook. If every attention module
that shares a config object is replaced, all modules of this model that share it get the copy, and `longvq_mask` makes
the masks in O(B·L). Otherwise the model keeps making dense masks, which every call verifies.
"""
