"""Original and swapped attention side by side, on the same inputs: teacher and student of distillation."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from longvq_layers.replace.model_inputs import ModelInputs, clone_tensors, main_output, run_model
from longvq_layers.replace.slot.attention_slot import AttentionSlot, fill_slot
from longvq_layers.replace.slot.context import FarQueryKey
from longvq_layers.replace.slot.full_attention import full_attention
from longvq_layers.replace.slot.swapped import SwappedAttention


class TeacherStudentSlot(AttentionSlot):
    """A slot that attends like the original attention (teacher) or like the swapped attention (student).

    Args:
        swapped: the student.

    Attributes:
        is_teacher: True (default) attends to every key.
        real: (B, L) of the last call, False = padding; None without padding.
    """

    def __init__(self, swapped: SwappedAttention) -> None:
        super().__init__()
        self._swapped = [swapped]  # in a list, so that it is no submodule
        self.rotary = swapped.rotary
        self.has_positions, self.linear_masks = swapped.has_positions, swapped.linear_masks
        self.contexts = {}
        self.is_teacher = True
        self.real: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(H, Hkv, D)."""
        return self._swapped[0].sizes

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        far: FarQueryKey | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """As `SwappedAttention.forward`; the teacher gives 0 at padded positions too."""
        self.real = None if key_padding_mask is None else ~key_padding_mask
        if not self.is_teacher:
            output: Tensor = self._swapped[0](q, k, v, key_padding_mask, far=far, causal=causal, scale=scale)
            return output
        output = full_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask, scale=scale)
        return output if self.real is None else output.masked_fill(~self.real[:, None, :, None], 0)


@dataclass
class RecordedForward:
    """One forward of a module: its arguments and its main output."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: Tensor | None = None


@dataclass
class RecordedForwards:
    """All forwards of one module, recorded by its two hooks."""

    forwards: list[RecordedForward] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Forward pre-hook with kwargs."""
        memo: dict[object, Tensor] = {}
        kept = tuple(_kept(x, memo) for x in args)
        self.forwards.append(RecordedForward(kept, {name: _kept(x, memo) for name, x in kwargs.items()}))

    def after(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Forward hook."""
        self.forwards[-1].output = clone_tensors(main_output(output))

    @property
    def outputs(self) -> list[Tensor]:
        """The main output of every forward."""
        return [forward.output for forward in self.forwards if forward.output is not None]


class TeacherStudent:
    """The swapped attention modules of a model, as teacher and student within a ``with`` block.

    Args:
        model: the model.
        students: name -> attention module and the swapped attention in its slot.
    """

    def __init__(self, model: nn.Module, students: Mapping[str, tuple[nn.Module, SwappedAttention]]) -> None:
        self.model = model
        self.modules = {name: module for name, (module, _) in students.items()}
        self.students = {name: swapped for name, (_, swapped) in students.items()}
        self._slots = {name: TeacherStudentSlot(swapped) for name, swapped in self.students.items()}

    def __enter__(self) -> "TeacherStudent":
        for name, module in self.modules.items():
            fill_slot(module, self._slots[name])
        return self

    def __exit__(self, *error: object) -> None:
        for name, module in self.modules.items():
            fill_slot(module, self.students[name])

    def run(self, batch: ModelInputs, *, teacher: bool) -> tuple[Tensor, dict[str, RecordedForwards]]:
        """The model's main output, and the forwards of every attention module, with teacher or student."""
        self._attend_as(teacher)
        with self._recording() as recorded:
            return main_output(run_model(self.model, batch)), recorded

    def errors(self, recorded: Mapping[str, RecordedForwards]) -> dict[str, Tensor]:
        """‖swapped − original‖² / ‖original‖² of each module, run with the inputs that the teacher had."""
        self._attend_as(False)
        found = {}
        for name, teacher in recorded.items():
            module = self.modules[name]
            outputs = [main_output(module(*forward.args, **forward.kwargs)) for forward in teacher.forwards]
            found[name] = self.error(name, outputs, teacher.outputs)
        return found

    def error(self, name: str, outputs: Sequence[Tensor], originals: Sequence[Tensor]) -> Tensor:
        """‖swapped − original‖² / ‖original‖² over the tokens of module `name`'s last call that are not padding."""
        real = self._slots[name].real
        pairs = [(_real_rows(a, real), _real_rows(b, real)) for a, b in zip(outputs, originals, strict=True)]
        difference = _sum([(a - b).float().square().sum() for a, b in pairs])
        return difference / _sum([b.float().square().sum() for _, b in pairs]).clamp(min=1e-12)

    def _attend_as(self, teacher: bool) -> None:
        for slot in self._slots.values():
            slot.is_teacher = teacher

    @contextlib.contextmanager
    def _recording(self) -> Iterator[dict[str, RecordedForwards]]:
        recorded = {name: RecordedForwards() for name in self.modules}
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(recorded[name].before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorded[name].after))
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()


def _kept(value: object, memo: dict[object, Tensor]) -> object:
    # A transformers cache holds the keys of this call already, so a second call with it would see them twice. Hidden
    # states are cloned, because an in-place residual may overwrite them. Masks are larger, and aren't cloned.
    if hasattr(value, "get_seq_length"):
        return None
    hidden_states = isinstance(value, Tensor) and value.is_floating_point() and value.dim() < 4
    return clone_tensors(value, memo) if hidden_states else value


def _real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, L, C) or (L, B, C), with zeros for padding."""
    if real is None or x.dim() != 3:
        return x
    rows = real if x.shape[:2] == real.shape else real.T if x.shape[:2] == real.T.shape else None
    return x if rows is None else x * rows.unsqueeze(-1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
