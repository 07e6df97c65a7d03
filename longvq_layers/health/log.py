"""All readings of a model as one row of a log."""

import math

from torch import nn

from longvq_layers.health.codebooks import codebook_statistics
from longvq_layers.health.gradients import gradient_scales
from longvq_layers.health.monitor import Monitor


def log_row(model: nn.Module, monitor: Monitor | None = None) -> dict[str, float]:
    """Numbers by name, with the same names in every call, for `csv.DictWriter` or any logger.

    | name | what | needs a monitor |
    |---|---|---|
    | `<codebook>/usage`, `/perplexity`, `/quantization_error`, `/dead`, `/top_share` | mean over heads | no |
    | `<block>/<kind>/gradient_ratio`, `/gradient_rms` | see `gradient_scales`; with a monitor, its gradients | no |
    | `<attention>/entropy` | last reading, mean over heads | yes |
    | `<gate>/mean`, `/closed`, `/open` | last reading | yes |
    | `commitment_ratio` | of the last `after_backward` | yes |

    Args:
        model: any module.
        monitor: of this model, default none.

    Returns:
        Dict of floats; NaN where there is no reading yet.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a codebook on the meta device.

    Example:
        >>> import torch, longvq_layers
        >>> layer = longvq_layers.VQAttention(32, 2, num_codes=16)
        >>> out = layer(torch.randn(2, 40, 32))
        >>> log_row(layer)["attention.codebook/usage"]
        1.0
    """
    row: dict[str, float] = {}
    heads: dict[str, list[float]] = {}
    for codebook in codebook_statistics(model):
        for column in ("usage", "perplexity", "quantization_error", "dead", "top_share"):
            heads.setdefault(_key(codebook.name, column), []).append(float(getattr(codebook, column)))
    row.update({name: _mean(values) for name, values in heads.items()})
    own = gradient_scales(model)  # its rows name the columns, whatever the monitor has recorded
    recorded = own if monitor is None else monitor.gradients or ()
    known = {(gradient.block, gradient.kind): gradient for gradient in recorded}
    for gradient in own:
        seen = known.get((gradient.block, gradient.kind))
        prefix = _key("outside" if gradient.block is None else gradient.block, gradient.kind)
        row[f"{prefix}/gradient_ratio"] = seen.ratio if seen else math.nan
        row[f"{prefix}/gradient_rms"] = seen.rms if seen else math.nan
    if monitor is None:
        return row
    for name, reading in monitor.entropy.items():
        row[_key(name, "entropy")] = _mean(reading.last)
    for gates, columns in (
        (monitor.output_gates, ("mean", "closed", "open")),
        (monitor.attention_gates, ("mean", "closed")),
    ):
        for name, reading in gates.items():
            values = reading.last or (math.nan,) * len(columns)
            row.update({_key(name, column): value for column, value in zip(columns, values, strict=True)})
    row["commitment_ratio"] = _mean(monitor.commitment.last)
    return row


def _key(name: str, reading: str) -> str:
    return f"{name}/{reading}" if name else reading


def _mean(values: tuple[float, ...] | list[float]) -> float:
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else math.nan
