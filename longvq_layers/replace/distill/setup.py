"""What distillation finds in a model, and how the model is while it lasts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longvq_layers.replace.distill.teacher_student import Pairs
from longvq_layers.replace.distill.trained_parameters import TrainedParameters
from longvq_layers.replace.install import Replacement, replacement_of
from longvq_layers.replace.slot.swapped import SwappedAttention

NAME = "distill_attention"  # in errors


def sites_of(model: object) -> dict[str, nn.Module]:
    """name -> attention module, of all swapped ones; raises where there is nothing that can be distilled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model: got {type(model).__name__}, expected a torch.nn.Module")
    found = {name: module for name, module in model.named_modules() if _is_swapped(module)}
    if not found:
        raise ValueError(f"{NAME}: model: nothing is replaced here; call replace_attention first")
    for name, module in found.items():
        if module.longvq.local_keys != "exact":
            raise NotImplementedError(
                f"{NAME}: {name}: local_keys='quantized' has no gradient of its codewords; use local_keys='exact'"
            )
        module.longvq.check_codes()
    return found


def _is_swapped(module: nn.Module) -> bool:
    return isinstance(module._modules.get("longvq"), SwappedAttention)


@contextlib.contextmanager
def prepared(model: nn.Module, sites: dict[str, nn.Module], projections: bool) -> Iterator[tuple]:
    """Pairs in place, eval mode, and only what is trained requires gradients.

    Afterwards all is as before, but for the trained values; after an error these too.

    Yields:
        the pairs; name -> tensor to train; the values before of all parameters that were or will be trained.
    """
    trained, before, records = _trained(model, sites, projections)
    start = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in trained.values()]
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for tensor in trained.values():
            tensor.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), Pairs(model, sites) as pairs:
            for seam in pairs.seams.values():
                seam.eval()
            yield pairs, trained, before
    except BaseException:
        with torch.no_grad():
            for tensor, value, *_ in start:
                tensor.copy_(value)
        raise
    else:
        for replacement, record in records:
            if record.parameters and not any(record is known for known in replacement.records):
                replacement.records.append(record)
        for site in sites.values():
            site.longvq.settle_trained()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for tensor, _, required, gradient in start:
            tensor.requires_grad_(required)
            tensor.grad = gradient
        for module, mode in modes:
            module.training = mode


def _trained(model: nn.Module, sites: dict[str, nn.Module], projections: bool):
    # name -> tensor to train; the values before of all parameters that were or will be trained; (replacement, its
    # record of them).
    trained: dict[str, Tensor] = {}
    records: dict[int, tuple[Replacement, TrainedParameters]] = {}
    for name, site in sites.items():
        seam = site.longvq
        trained[f"{name}.longvq.codebook.embedding"] = seam.codebook.embedding
        if seam.variance_correction:
            trained |= {f"{name}.longvq.{key}": getattr(seam, key) for key in ("spread", "spread_gain")}
        replacement = replacement_of(model, site)
        if replacement is None and projections:
            raise ValueError(
                f"{NAME}: projections: what {name} was before isn't known here; pass the model that was given to "
                "replace_attention, or one that contains it"
            )
        if replacement is None:
            continue
        earlier = [record for record in replacement.records if isinstance(record, TrainedParameters)]
        new = (replacement, earlier[0] if earlier else TrainedParameters())
        _, record = records.setdefault(id(replacement), new)
        for key, parameter in site.named_parameters() if projections else ():
            record.add(parameter)
            if not any(parameter is known for known in trained.values()):
                trained[f"{name}.{key}"] = parameter
    before = TrainedParameters()
    for _, record in records.values():
        before.parameters += record.parameters
        before.originals += record.originals
    return trained, before, list(records.values())
