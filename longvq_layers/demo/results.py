"""What each part of the demo returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QualityRow:
    """One (codes, window) setting on the held-out documents."""

    num_codes: int
    window: int
    cosine: float  # mean cosine similarity of the embeddings before and after
    neighbours: float  # share of documents whose nearest other document stays the same
    key_error: float | None  # as in the report of `replace_attention`, mean over the layers
    output_error: float | None
    seconds: float
    target: float | None = None


@dataclass(frozen=True)
class QualityResult:
    """Part 1."""

    model: str
    calibration_documents: int
    held_out_documents: int
    mean_tokens: float
    rows: list[QualityRow]


@dataclass(frozen=True)
class SpeedRow:
    """One length: medians of one forward in seconds, peak extra memory of one forward in bytes."""

    length: int
    own_seconds: float
    our_seconds: float
    cosine: float  # of the last hidden states with and without the swap
    own_bytes: int | None = None
    our_bytes: int | None = None

    @property
    def speed_up(self) -> float:
        return self.own_seconds / self.our_seconds


@dataclass(frozen=True)
class SpeedResult:
    """Part 2."""

    architecture: str
    num_codes: int
    window: int
    rows: list[SpeedRow]


@dataclass(frozen=True)
class TrainingPoint:
    """One evaluation."""

    seconds: float
    step: int
    bits_per_byte: float  # on held-out files


@dataclass(frozen=True)
class TrainingResult:
    """Part 3."""

    model: str
    points: list[TrainingPoint]
    bytes_seen: int
