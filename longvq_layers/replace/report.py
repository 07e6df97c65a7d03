"""What a replacement did, layer by layer."""

from dataclasses import dataclass, field

from torch import nn

from longvq_layers.replace.adapters.base import Site


@dataclass(frozen=True)
class LayerReport:
    """One attention module: what it was, what it is now, how well the codebook fits it, or why it was skipped."""

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
        layers: every attention module found, in the order of the model.
        dry_run: True if the model was left alone.
        calibration_keys: keys per head that the codebooks were fitted to, 0 without calibration.
    """

    layers: list[LayerReport]
    dry_run: bool = False
    calibration_keys: int = 0
    model: nn.Module | None = field(default=None, repr=False)
    replacement: object | None = field(default=None, repr=False)  # what to undo

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
        if self.dry_run:
            raise ValueError("restore: this report is of a dry run, nothing was replaced")
        self.replacement.undo_in(self.model)

    def __enter__(self) -> "ReplacementReport":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.dry_run and self.replacement.stands_in(self.model):
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
    cells = [layer.new_kind, layer.causal, layer.num_codes, layer.window, layer.local_keys, layer.backend]
    errors = ["-" if error is None else f"{error:.4f}" for error in (layer.key_error, layer.output_error)]
    return [layer.name, layer.kind, *[str(cell) for cell in cells], *errors]


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def _gather(layers: list[LayerReport], texts) -> dict[str, list[str]]:
    # The same remark about many layers is printed once: remark -> names.
    gathered: dict[str, list[str]] = {}
    for layer in layers:
        for text in texts(layer):
            gathered.setdefault(text, []).append(layer.name)
    return {text: names if len(names) <= 3 else [f"{len(names)} modules"] for text, names in gathered.items()}


def _why_skipped(layer: LayerReport) -> tuple[str, ...]:
    return (layer.skipped,)


def _notes(layer: LayerReport) -> tuple[str, ...]:
    return layer.notes


def layer_report(site: Site, options: dict, errors: tuple[float, float] | None, skipped: str | None) -> LayerReport:
    """What became of a site: replaced with these options and errors (of keys and output), or skipped and why."""
    used = {key: None for key in options} if skipped else {**options, "backend": site.backend}
    if site.num_codes is not None and not skipped:
        used["num_codes"] = site.num_codes
    key_error, output_error = errors or (None, None)
    return LayerReport(
        name=site.name or "(model)",
        kind=site.kind,
        new_kind=None if skipped else site.new_kind,
        causal=site.causal,
        key_error=key_error,
        output_error=output_error,
        skipped=skipped,
        far_positions=None if skipped or not site.has_rotary else "rotated" if site.rotary is None else "rectified",
        notes=() if skipped else tuple(site.notes),
        **used,
    )
