"""One model of transformers, replaced and compared: equal to the dense definition and, with a wide window, to itself.

Every comparison is made without and with padding, and through a cache in two pieces where the model has one.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks import architectures_inputs, architectures_tiny
from longvq_layers.replace import replace_attention

COARSE = {"num_codes": 8, "window": 5}
WIDE = {"num_codes": 8, "window": 4096}  # nothing is far
_BOUND = 2e-4  # of a difference, relative to the largest value; float32 through a few layers
_SPLIT = 29  # tokens of the first piece
_CACHES = ("cache", "past_key_values")

EQUAL, REFUSED, NOT_BUILT, BUG = "replaced and equal", "refused", "could not be built tiny", "BUG"


@dataclass
class Verdict:
    """What came out for one class."""

    kind: str  # EQUAL, REFUSED, NOT_BUILT or BUG
    detail: str = ""
    replaced: int = 0
    attentions: int = 0  # that the inputs reached
    skipped: dict[str, str] = field(default_factory=dict)  # module -> why


class Bug(AssertionError):
    """Replaced, and not what it should be."""


def verdict(config_class: type, model_class: type) -> Verdict:
    """Build, run, replace and compare one class."""
    try:
        model, inputs = _built(config_class, model_class)
    except Unbuilt as error:
        return Verdict(NOT_BUILT, str(error))
    return compare(model, inputs)


class Unbuilt(Exception):
    """No way was found to build or run a class; the message is the first reason."""


def _built(config_class: type, model_class: type) -> tuple[nn.Module, dict[str, Tensor]]:
    reasons = []
    for config in architectures_tiny.tiny_configs(config_class):
        for stir in (True, False):
            try:
                if isinstance(config, Exception):
                    raise config
                model = architectures_tiny.build(model_class, config, stir=stir)
            except Exception as error:
                reasons.append(said(error))
                break
            finite = True
            for inputs in architectures_inputs.candidates(model):
                try:
                    outputs = _run(model, inputs)
                except Exception as error:
                    reasons.append(said(error))
                    continue
                finite = all(x.isfinite().all() for x in outputs)
                if outputs and finite:
                    return model, inputs
                reasons.append("its output is not finite" if outputs else "it gives no tensor")
            if finite:
                break
    raise Unbuilt(reasons[0] if reasons else "no inputs are known for it")


def compare(model: nn.Module, inputs: dict[str, Tensor]) -> Verdict:
    """Replace the attentions that the inputs reach, every way, and say what came out; the model stays as it was."""
    reached = _reached(model, inputs)
    with_padding = architectures_inputs.padded(model, inputs)
    if with_padding is not None and _fails(model, with_padding):
        with_padding = None
    batches = [inputs] if with_padding is None else [inputs, with_padding]
    pieces = _pieces(model, inputs)
    originals = [_run(model, batch) for batch in batches]
    options = {"calibration": batches, "strict": False, "filter_fn": lambda module, name: name in reached}
    try:
        report = replace_attention(model, **WIDE, **options)
    except ValueError as error:
        if "nothing to replace" in str(error):
            return Verdict(REFUSED, _reasons(str(error)), attentions=_count(str(error)))
        return Verdict(BUG, said(error))
    except Exception as error:
        return Verdict(BUG, said(error))
    layers = [layer for layer in report.layers if layer.name in reached or layer.name == "(model)"]
    result = Verdict(EQUAL, "", len(report.replaced), len(layers))
    result.skipped = {layer.name: layer.skipped for layer in layers if layer.skipped}
    try:
        _same(model, batches, originals, "the original")
        report.restore()
        _same(model, batches, originals, "itself once restored", bound=0.0)
        replace = {**COARSE, **options}
        report = replace_attention(model, **replace, backend="reference")
        dense = [_run(model, batch) for batch in batches]
        report.restore()
        report = replace_attention(model, **replace)
        _same(model, batches, dense, "the definition")
        if not _differ(dense[0], originals[0]):
            result.detail = "its output does not show it"
        if pieces is not None:
            _same_in_pieces(model, pieces, result)
        report.restore()
        _same(model, batches, originals, "itself once restored again", bound=0.0)
    except Bug as bug:
        return Verdict(BUG, str(bug), result.replaced, result.attentions, result.skipped)
    except Exception as error:
        return Verdict(BUG, f"raised once replaced: {said(error)}", result.replaced, result.attentions, result.skipped)
    return result


def _run(model: nn.Module, inputs: dict) -> list[Tensor]:
    # Every floating tensor of the output, without padded positions; some models draw random numbers.
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = list(_tensors(model(**inputs)))
    mask = inputs.get("attention_mask")
    if mask is None:
        return outputs
    return [x[mask.bool()] for x in outputs if x.shape[:2] == mask.shape][:1]


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in _CACHES and "attentions" not in name:  # weights that nobody asked for: there are none
                yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _fails(model: nn.Module, inputs: dict) -> bool:
    # Also where other tokens at padded positions change the real ones: that model reads its padding.
    try:
        before = _run(model, inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        after = _run(model, {**inputs, "input_ids": torch.where(mask, ids, ids.flip(-1))})
    except Exception:  # of the original: any of 625 classes, for any reason of its own
        return True
    return not before or not all(x.isfinite().all() for x in before) or _differ(before, after)


def _differ(ones: list[Tensor], others: list[Tensor], bound: float = _BOUND) -> float:
    # The largest difference, relative, where it is above the bound; 0 otherwise.
    worst = 0.0 if len(ones) == len(others) else float("inf")
    for one, other in zip(ones, others, strict=False):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            error = float((one - other).abs().max() / (1 + other.abs().max()))
            worst = max(worst, error if error == error else float("inf"))
    return worst if worst > bound else 0.0


def _same(model: nn.Module, batches: list, expected: list, what: str, bound: float = _BOUND) -> None:
    for batch, wanted in zip(batches, expected, strict=True):
        error = _differ(_run(model, batch), wanted, bound)
        if error:
            padding = " with padding" if "attention_mask" in batch else ""
            raise Bug(f"differs from {what}{padding} by {error:.2g}")


def _pieces(model: nn.Module, inputs: dict) -> list[dict] | None:
    # The inputs cut in two, where the original model gives the same in pieces with its cache.
    ids = inputs.get("input_ids")
    if ids is None or set(inputs) != {"input_ids"}:
        return None
    pieces = [{"input_ids": ids[:, :_SPLIT]}, {"input_ids": ids[:, _SPLIT:]}]
    try:
        in_pieces = _run_pieces(model, pieces)
        whole = _run(model, inputs)[0]
    except Exception:  # of the original, which then has no pieces to compare with
        return None
    if in_pieces is None or whole.shape[:2] != ids.shape or _differ([in_pieces], [whole[:, _SPLIT:]]):
        return None
    return pieces


def _run_pieces(model: nn.Module, pieces: list[dict]) -> Tensor | None:
    torch.manual_seed(0)
    with torch.no_grad():
        first = model(**pieces[0], use_cache=True)
        cache = next((name for name in _CACHES if first.get(name) is not None), None)
        return None if cache is None else next(_tensors(model(**pieces[1], **{cache: first[cache]}, use_cache=True)))


def _same_in_pieces(model: nn.Module, pieces: list[dict], result: Verdict) -> None:
    whole = _run(model, {"input_ids": torch.cat([piece["input_ids"] for piece in pieces], dim=1)})[0]
    try:
        in_pieces = _run_pieces(model, pieces)
    except NotImplementedError as error:
        result.detail = f"refuses its cache: {said(error)}"
        return
    error = float("inf") if in_pieces is None else _differ([in_pieces], [whole[:, _SPLIT:]])
    if error:
        raise Bug(f"differs in two pieces with a cache from the whole by {error:.2g}")


def _reached(model: nn.Module, inputs: dict) -> set[str]:
    names = {id(module): name for name, module in model.named_modules()}
    reached = set()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: reached.add(names.get(id(module)))
    )
    try:
        _run(model, inputs)
    finally:
        handle.remove()
    return reached


def _reasons(text: str) -> str:
    # The distinct reasons of "nothing to replace in X:\n  name: why\n  name: why".
    lines = text.split("\n")[1:]
    whys = [line.strip().split(": ", 1)[-1] for line in lines]
    whys = [why for why in whys if why != "filter_fn returned False"]
    if not lines:
        return "its attention is not that of transformers' attention interface"
    return "; ".join(dict.fromkeys(whys)) or "the inputs reach none of its attentions"


def _count(text: str) -> int:
    return sum("filter_fn returned False" not in line for line in text.split("\n")[1:])


def said(error: BaseException) -> str:
    """What an error says, in short, without the folder that packages are in."""
    text = " ".join(str(error).split()).replace(f"{sysconfig.get_path('purelib')}/", "")
    return f"{type(error).__name__}: {text}"[:200]
