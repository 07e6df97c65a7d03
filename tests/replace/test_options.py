"""Wrong options of replace_attention: each is refused by its name, and the model stays as it was."""

import numpy
import pytest
import torch

from longvq_layers.replace import replace_attention
from tests.replace.models import bert, llama, snapshot, tokens


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "num_codes must be an int, got float", {"num_codes": 8.0}),
        (ValueError, "num_codes must be at least 1, got 0", {"num_codes": 0}),
        (ValueError, "window must be at least 0, got -1", {"window": -1}),
        (TypeError, "window must be an int, got bool", {"window": True}),
        (ValueError, "local_keys must be one of 'quantized', 'exact', got 'precise'", {"local_keys": "precise"}),
        (ValueError, "backend must be one of .*, got 'cuda'", {"backend": "cuda"}),
        (TypeError, "filter_fn must be a callable or None, got str", {"filter_fn": "layer"}),
        (
            TypeError,
            "filter_fn must return a bool, got NoneType for 'encoder.layer.0",
            {"filter_fn": lambda module, name: None},
        ),
        (
            TypeError,
            "filter_fn must return a bool, got int for 'encoder.layer.0",
            {"filter_fn": lambda module, name: 1},
        ),
        (TypeError, "strict must be a bool, got 1", {"strict": 1}),
        (TypeError, "variance_correction must be a bool, got 'yes'", {"variance_correction": "yes"}),
        (TypeError, "unexpected keyword argument 'codes'", {"codes": 8}),
        (ValueError, "nothing to replace in BertModel:\n.*filter_fn returned False", {"filter_fn": lambda m, n: False}),
        (
            ValueError,
            "calibration must be given for a model in eval mode, got None, but encoder.layer.0.attention.self, ",
            {"calibration": None},
        ),
        (ValueError, "calibration must have at least one input, got none", {"calibration": []}),
        (ValueError, "calibration must have at least one input, got none", {"calibration": iter(())}),
        (
            TypeError,
            "calibration must be an iterable of model inputs, got Tensor; wrap one input in a list",
            {"calibration": tokens()},
        ),
        (
            TypeError,
            "calibration must be an iterable of model inputs, got dict; wrap one input in a list",
            {"calibration": {"input_ids": tokens()}},
        ),
        (TypeError, "calibration must be an iterable .*, got Tensor; wrap", {"calibration": tokens(), "dry_run": True}),
        (TypeError, "calibration must be an iterable .*, got int; wrap", {"calibration": 3, "dry_run": True}),
        (TypeError, "calibration must hold tensors, .*, got an input of type int", {"calibration": [3]}),
    ],
)
def test_bad_options_raise_and_touch_nothing(error, message, options):
    model = bert()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_attention(model, **{"num_codes": 8, "calibration": [tokens()], **options})
    assert snapshot(model) == before


def test_a_backend_without_a_kernel_for_the_model_is_refused():
    model = bert().double()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=r"compiled kernels for torch\.float32, .*got torch\.float64"):
        replace_attention(model, num_codes=8, calibration=[tokens()], backend="native")
    assert snapshot(model) == before


def test_integers_of_other_libraries_are_integers():
    calibration = iter([tokens()])
    options = {"num_codes": numpy.int64(8), "window": torch.tensor(5), "calibration": calibration}
    assert type(replace_attention(bert(), **options, dry_run=True).layers[0].num_codes) is int
    assert replace_attention(bert(), **options).layers[0].window == 5  # the dry run left the iterator full


def test_a_window_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match="trained_length must be more than window=8, got 8"):
        replace_attention(llama(), num_codes=8, window=8, trained_length=8, calibration=[tokens(2, 40)])
