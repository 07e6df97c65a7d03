"""One model of transformers, replaced and compared: with the dense definition and, with a wide window, with itself.

Every comparison is made without and with padding, and through a cache in two pieces where the model has one.
"""

import sysconfig
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from longvq_layers.benchmarks.architectures import inputs as model_inputs
from longvq_layers.benchmarks.architectures import tiny
from longvq_layers.benchmarks.architectures.run_model import (
    BOUND,
    Inputs,
    difference,
    difference_in_pieces,
    ignores_padding,
    pieces_of,
    reached_modules,
    run,
)
from longvq_layers.replace import replace_attention

_NUM_CODES = 8
_NARROW, _WIDE = 5, 4096  # windows; nothing is outside of the wide one

EQUAL, REFUSED, NOT_BUILT, BUG = "replaced and equal", "refused", "could not be built tiny", "BUG"
_FILTERED = "filter_fn returned False"  # the reason of `replace_attention` for modules that the inputs do not reach


@dataclass
class Verdict:
    """The result of one class."""

    kind: str  # EQUAL, REFUSED, NOT_BUILT or BUG
    detail: str = ""
    replaced: int = 0
    attentions: int = 0  # that the inputs reached
    skipped: dict[str, str] = field(default_factory=dict)  # module -> reason


class Bug(AssertionError):
    """The replaced model differs from what it must equal."""


class NotBuilt(Exception):
    """A class that could not be built or run; the message is the first reason."""


def verdict(config_class: type, model_class: type) -> Verdict:
    """Build, run, replace and compare one class."""
    try:
        model, inputs = _built(config_class, model_class)
    except NotBuilt as error:
        return Verdict(NOT_BUILT, str(error))
    return compare(model, inputs)


def _built(config_class: type, model_class: type) -> tuple[nn.Module, Inputs]:
    reasons = []
    for config in tiny.tiny_configs(config_class):
        for stir in (True, False):
            try:
                if isinstance(config, Exception):
                    raise config
                model = tiny.build(model_class, config, stir=stir)
            except Exception as error:
                reasons.append(in_short(error))
                break
            finite = True
            for inputs in model_inputs.candidates(model):
                try:
                    outputs = run(model, inputs)
                except Exception as error:
                    reasons.append(in_short(error))
                    continue
                finite = all(bool(x.isfinite().all()) for x in outputs)
                if outputs and finite:
                    return model, inputs
                reasons.append("its output is not finite" if outputs else "it gives no tensor")
            if finite:
                break
    raise NotBuilt(reasons[0] if reasons else "no inputs are known for it")


def compare(model: nn.Module, inputs: Inputs) -> Verdict:
    """Replace the attentions that the inputs reach, run every comparison, and restore the model."""
    reached = reached_modules(model, inputs)
    with_padding = model_inputs.padded(model, inputs)
    batches = [inputs]
    if with_padding is not None and ignores_padding(model, with_padding):
        batches.append(with_padding)
    pieces = pieces_of(model, inputs)
    originals = [run(model, batch) for batch in batches]
    replace = partial(
        replace_attention,
        model,
        num_codes=_NUM_CODES,
        calibration=batches,
        strict=False,
        filter_fn=lambda module, name: name in reached,
    )
    try:
        report = replace(window=_WIDE)
    except ValueError as error:
        if "nothing to replace" in str(error):
            return Verdict(REFUSED, _reasons(str(error)), attentions=_count(str(error)))
        return Verdict(BUG, in_short(error))
    except Exception as error:
        return Verdict(BUG, in_short(error))
    layers = [layer for layer in report.layers if layer.name in reached or layer.name == "(model)"]
    result = Verdict(EQUAL, "", len(report.replaced), len(layers))
    result.skipped = {layer.name: layer.skipped for layer in layers if layer.skipped}
    try:
        _check_equal(model, batches, originals, "the original")
        report.restore()
        _check_equal(model, batches, originals, "itself once restored", bound=0.0)
        report = replace(window=_NARROW, backend="reference")
        dense = [run(model, batch) for batch in batches]
        report.restore()
        report = replace(window=_NARROW)
        _check_equal(model, batches, dense, "the definition")
        if not difference(dense[0], originals[0]):
            result.detail = "its output does not show it"
        if pieces is not None:
            _check_pieces(model, pieces, result)
        report.restore()
        _check_equal(model, batches, originals, "itself once restored again", bound=0.0)
    except Bug as bug:
        return Verdict(BUG, str(bug), result.replaced, result.attentions, result.skipped)
    except Exception as error:
        detail = f"raised once replaced: {in_short(error)}"
        return Verdict(BUG, detail, result.replaced, result.attentions, result.skipped)
    return result


def _check_equal(
    model: nn.Module, batches: list[Inputs], expected: list[list[Tensor]], what: str, bound: float = BOUND
) -> None:
    for batch, wanted in zip(batches, expected, strict=True):
        error = difference(run(model, batch), wanted, bound)
        if error:
            padding = " with padding" if "attention_mask" in batch else ""
            raise Bug(f"differs from {what}{padding} by {error:.2g}")


def _check_pieces(model: nn.Module, pieces: list[Inputs], result: Verdict) -> None:
    try:
        error = difference_in_pieces(model, pieces)
    except NotImplementedError as refusal:
        result.detail = f"refuses its cache: {in_short(refusal)}"
        return
    if error:
        raise Bug(f"differs in two pieces with a cache from the whole by {error:.2g}")


def _reasons(text: str) -> str:
    """The distinct reasons in "nothing to replace in X:\\n  name: reason\\n  name: reason"."""
    lines = text.split("\n")[1:]
    reasons = [line.strip().split(": ", 1)[-1] for line in lines]
    if not lines:
        return "its attention is not that of transformers' attention interface"
    distinct = dict.fromkeys(reason for reason in reasons if reason != _FILTERED)
    return "; ".join(distinct) or "the inputs reach none of its attentions"


def _count(text: str) -> int:
    return sum(_FILTERED not in line for line in text.split("\n")[1:])


def in_short(error: BaseException) -> str:
    """Type and message of an error on one line, without the path of the installed packages."""
    text = " ".join(str(error).split()).replace(f"{sysconfig.get_path('purelib')}/", "")
    return f"{type(error).__name__}: {text}"[:200]
