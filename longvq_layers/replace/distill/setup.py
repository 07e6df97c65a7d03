"""Prepares a model for distillation, and leaves it as it was apart from the trained values."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.replace.distill.teacher_student import TeacherStudent
from longvq_layers.replace.distill.trained_parameters import TrainedParameters
from longvq_layers.replace.install import Replacement, replacement_of
from longvq_layers.replace.model_inputs import keep_modes
from longvq_layers.replace.slot.attention_slot import SLOT
from longvq_layers.replace.slot.swapped import SwappedAttention, find_swapped

NAME = "distill_attention"  # in errors
Students = Mapping[str, tuple[nn.Module, SwappedAttention]]  # name -> attention module, and what is in its slot


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model that is ready to be distilled.

    Attributes:
        compared: its attention modules as teacher and student.
        trained: name -> tensor to train.
        before: the original values of all parameters that were or will be trained.
    """

    compared: TeacherStudent
    trained: dict[str, Tensor]
    before: TrainedParameters


def students_of(model: object) -> Students:
    """All swapped attention modules of a model.

    Raises:
        TypeError: model is no module.
        ValueError: nothing is replaced.
        NotImplementedError: quantised local keys.
        RuntimeError: a codebook without codes.
    """
    check.module(NAME, "model", model)
    found = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        swapped = find_swapped(module)
        if swapped is not None:
            found[name] = module, swapped
    if not found:
        raise ValueError(
            f"{NAME}: model must have replaced attention, got a model in which nothing is replaced; call "
            "replace_attention first"
        )
    for name, (_, swapped) in found.items():
        if swapped.local_keys != "exact":
            raise NotImplementedError(
                f"{NAME}: {name} must have local_keys='exact', got 'quantized', which has no gradient of its codewords"
            )
        swapped.check_codes()
    return found


@contextlib.contextmanager
def prepared(model: nn.Module, students: Students, projections: bool) -> Iterator[Prepared]:
    """Put teacher and student in place, in eval mode; only the trained tensors require gradients.

    At the end everything but the trained values is as before. After an error the trained values are as before too.
    """
    trained, before, records = _trained(model, students, projections)
    start = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in trained.values()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with keep_modes(model):
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            for tensor in trained.values():
                tensor.requires_grad_(True)
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                TeacherStudent(model, students) as compared,
            ):
                for student in compared.students.values():
                    student.eval()
                yield Prepared(compared, trained, before)
        except BaseException:
            with torch.no_grad():
                for tensor, value, *_ in start:
                    tensor.copy_(value)
            raise
        else:
            for replacement, record in records:
                if record.parameters and not any(record is known for known in replacement.records):
                    replacement.add(record)
            for _, swapped in students.values():
                swapped.sync_ema()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for tensor, _, required, gradient in start:
                tensor.requires_grad_(required)
                tensor.grad = gradient


def _trained(
    model: nn.Module, students: Students, projections: bool
) -> tuple[dict[str, Tensor], TrainedParameters, list[tuple[Replacement, TrainedParameters]]]:
    """name -> tensor to train; the original values of all parameters that were or will be trained; each replacement
    with its record of them.
    """
    trained: dict[str, Tensor] = {}
    records: dict[int, tuple[Replacement, TrainedParameters]] = {}
    for name, (module, swapped) in students.items():
        trained[f"{name}.{SLOT}.codebook.embedding"] = swapped.codebook.embedding
        if swapped.variance_correction:
            trained |= {f"{name}.{SLOT}.{key}": getattr(swapped, key) for key in ("spread", "spread_gain")}
        replacement = replacement_of(model, module)
        if replacement is None and projections:
            raise ValueError(
                f"{NAME}: model must be the one that was given to replace_attention, or one that contains it, with "
                f"projections=True, got a model in which the original {name} isn't known here"
            )
        if replacement is None:
            continue
        earlier = [record for record in replacement.records if isinstance(record, TrainedParameters)]
        new = (replacement, earlier[0] if earlier else TrainedParameters())
        _, record = records.setdefault(id(replacement), new)
        for key, parameter in module.named_parameters() if projections else ():
            record.add(parameter)
            if not any(parameter is known for known in trained.values()):
                trained[f"{name}.{key}"] = parameter
    before = TrainedParameters()
    for _, record in records.values():
        before.parameters += record.parameters
        before.originals += record.originals
    return trained, before, list(records.values())
