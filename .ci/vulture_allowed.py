"""Names that look unused to vulture because other code calls them. `make vulture` reads this file.

Fixtures, `pytest_…` hooks and registered functions are excepted in pyproject.toml.
"""

# Signatures that Python or PyTorch prescribe.
exception  # __exit__
protocol  # __reduce_ex__
average_attn_weights  # torch.nn.MultiheadAttention.forward
grad_normalizers  # backward of an operator: one gradient for each output
_.__class__
_.get_extra_state  # nn.Module
_.set_extra_state
_.generate_vmap_rule  # torch.autograd.Function

# What transformers asks models, configurations and caches for.
_.accepts_loss_kwargs
_.add_cross_attention
_.base_model_prefix
_.get_mask_sizes
_.get_max_cache_shape
_.get_output_embeddings
_.init_weights
_._init_weights
_.is_compileable
_.is_croppable
_.is_linear
_.is_sliding
_.keys_to_ignore_at_inference
_.prefetch
_._prepare_cache_for_generation
_.reorder_cache
_.set_output_embeddings
_._supports_default_dynamic_cache
_.supports_early_init
_.supports_gradient_checkpointing

# What setuptools calls in setup.py.
_.description
_.finalize_options
_.get_output_mapping
_.get_outputs
_.get_source_files
_.has_ext_modules
_.initialize_options
_.user_options
