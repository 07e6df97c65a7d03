"""What a replacement did, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.install import Replacement
from longvq_layers.replace.plan import SwapPlan


@dataclass(frozen=True)
class LayerReport:
    """One attention module: its kind before and now, how well its codebook fits, or why it was skipped."""

    name: str
    kind: str
    new_kind: str | None
    causal: str
    num_codes: int | None
    window: int | None
    local_keys: str | None
    backend: str | None
    key_error: float | None  # share of the keys' variance that the codes miss, in the metric of the queries
    output_error: float | None  # ‖swapped − original‖ / ‖original‖ of the attention output, on the calibration data
    skipped: str | None = None
    far_positions: str | None = None  # "rectified" or "rotated", see `replace_attention`; None without rotary positions
    notes: tuple[str, ...] = ()


@dataclass
class ReplacementReport:
    """What `replace_attention` did: one `LayerReport` per attention module; `print` shows a table.

    As a context manager it restores the original attention at the end of the block.

    Attributes:
        layers: every attention module that was found, in the order of the model.
        dry_run: True if the model was not changed.
        calibration_keys: keys per head that the codebooks were fitted to, 0 without calibration.
        model: the model that was changed.
    """

    layers: list[LayerReport]
    dry_run: bool = False
    calibration_keys: int = 0
    model: nn.Module | None = field(default=None, repr=False)
    replacement: Replacement | None = field(default=None, repr=False)  # undoes it; None after a dry run

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that were replaced (in a dry run: that would be)."""
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers that keep their attention; each says why in `.skipped`."""
        return [layer for layer in self.layers if layer.skipped is not None]

    def restore(self) -> None:
        """Put the original attention of these modules back: the same objects as before, bit-identical outputs.

        Raises:
            ValueError: a dry run, or this replacement was restored already.
        """
        if self.replacement is None or self.model is None:
            raise ValueError("restore: the report must be of a replacement, got one of a dry run; nothing was replaced")
        self.replacement.undo_in(self.model)

    def __enter__(self) -> "ReplacementReport":
        return self

    def __exit__(self, *error: object) -> None:
        if self.replacement is not None and self.model is not None and self.replacement.is_active_on(self.model):
            self.restore()

    def __str__(self) -> str:
        verb = "would replace" if self.dry_run else "replaced"
        title = f"{verb} {len(self.replaced)} of {len(self.layers)} attention modules"
        if self.calibration_keys:
            title += f", codebooks fitted to {self.calibration_keys:,} keys per head"
        header = ["module", "was", "is", "causal", "codes", "window", "local keys", "backend", "key err", "out err"]
        rows = [_row(layer) for layer in self.layers]
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = [title, _line(header, widths), _line(["-" * width for width in widths], widths)]
        lines += [_line(row, widths) for row in rows]
        lines += [f"skipped {', '.join(names)}: {why}" for why, names in _gather(self.skipped, _why_skipped).items()]
        lines += [f"note ({', '.join(names)}): {note}" for note, names in _gather(self.layers, _notes).items()]
        return "\n".join(line.rstrip() for line in lines)


def _row(layer: LayerReport) -> list[str]:
    if layer.skipped is not None:
        return [layer.name, layer.kind, "(skipped)", layer.causal, *["-"] * 6]
    cells: list[object] = [layer.new_kind, layer.causal, layer.num_codes, layer.window, layer.local_keys, layer.backend]
    errors = ["-" if error is None else f"{error:.4f}" for error in (layer.key_error, layer.output_error)]
    return [layer.name, layer.kind, *map(str, cells), *errors]


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def _gather(layers: Sequence[LayerReport], texts: Callable[[LayerReport], tuple[str, ...]]) -> dict[str, list[str]]:
    """text -> names of its layers, because a text about many layers is printed once."""
    gathered: dict[str, list[str]] = {}
    for layer in layers:
        for text in texts(layer):
            gathered.setdefault(text, []).append(layer.name)
    return {text: names if len(names) <= 3 else [f"{len(names)} modules"] for text, names in gathered.items()}


def _why_skipped(layer: LayerReport) -> tuple[str, ...]:
    return () if layer.skipped is None else (layer.skipped,)


def _notes(layer: LayerReport) -> tuple[str, ...]:
    return layer.notes


def skipped_layer(site: Site, why: str) -> LayerReport:
    """The report of a module that keeps its attention."""
    return LayerReport(
        name=site.name or "(model)",
        kind=site.kind,
        new_kind=None,
        causal=site.causal,
        num_codes=None,
        window=None,
        local_keys=None,
        backend=None,
        key_error=None,
        output_error=None,
        skipped=why,
    )


def replaced_layer(plan: SwapPlan, errors: tuple[float, float] | None = None) -> LayerReport:
    """The report of a module that was replaced as planned; `errors` of its keys and its output, if measured."""
    key_error, output_error = (None, None) if errors is None else errors
    return LayerReport(
        name=plan.site.name or "(model)",
        kind=plan.site.kind,
        new_kind=plan.site.new_kind,
        causal=plan.causal,
        num_codes=plan.options.num_codes,
        window=plan.options.window,
        local_keys=plan.options.local_keys,
        backend=plan.served_by,
        key_error=key_error,
        output_error=output_error,
        far_positions=plan.far_positions,
        notes=plan.notes,
    )
