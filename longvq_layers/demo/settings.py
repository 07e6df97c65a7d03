"""What the demo measures: the numbers of the full and the quick run, and the rows that each part returns."""

from dataclasses import dataclass, field

PARTS = ("quality", "speed", "training")


class DemoError(RuntimeError):
    """Something the user can put right; printed without a traceback."""


@dataclass(frozen=True)
class QualitySettings:
    """Part 1. ``targets`` are the mean cosines of a first measurement, by (codes, window)."""

    pairs: tuple[tuple[int, int], ...] = ((128, 0), (256, 0), (256, 8), (256, 32), (512, 32))
    targets: dict[tuple[int, int], float] = field(
        default_factory=lambda: {
            (128, 0): 0.879,
            (256, 0): 0.898,
            (256, 8): 0.933,
            (256, 32): 0.961,
            (512, 32): 0.966,
        }
    )
    calibration_documents: int = 32
    held_out_documents: int = 64
    max_tokens: int = 512
    batch_size: int = 8


@dataclass(frozen=True)
class SpeedSettings:
    """Part 2: a BERT of random weights."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    num_codes: int = 256
    window: int = 64
    layers: int = 2
    hidden: int = 256
    heads: int = 4
    seconds_per_length: float = 4.0  # of timed forwards, unless that allows fewer than three of each
    most_repeats: int = 15
    calibration_tokens: int = 2048


@dataclass(frozen=True)
class TrainingSettings:
    """Part 3: a byte language model."""

    seconds: float = 55.0  # with the evaluations about a minute
    evaluate_every: float = 5.0  # seconds
    d_model: int = 128
    blocks: int = 2
    num_codes: int = 64
    window: int = 32
    d_state: int = 16
    length: int = 256
    batch_size: int = 4
    learning_rate: float = 1e-2
    train_bytes: int = 6_000_000
    held_out_bytes: int = 16_384


@dataclass(frozen=True)
class Settings:
    quality: QualitySettings = field(default_factory=QualitySettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def quick() -> Settings:
    """Every part in miniature: shows that everything runs, the figures mean little."""
    return Settings(
        QualitySettings(
            pairs=((64, 0), (64, 16)),
            targets={},
            calibration_documents=4,
            held_out_documents=8,
            max_tokens=128,
            batch_size=4,
        ),
        SpeedSettings(
            lengths=(256, 512), num_codes=32, layers=1, seconds_per_length=0.3, most_repeats=3, calibration_tokens=256
        ),
        TrainingSettings(
            seconds=5.0, evaluate_every=1.0, d_model=64, length=128, train_bytes=200_000, held_out_bytes=2048
        ),
    )


@dataclass(frozen=True)
class QualityRow:
    """One (codes, window) setting on the held-out documents."""

    num_codes: int
    window: int
    cosine: float  # mean cosine similarity of the embeddings before and after
    neighbours: float  # share of documents whose nearest other document stays the same
    key_error: float | None  # means over the layers of the replacement's report, on the calibration documents
    output_error: float | None
    seconds: float
    target: float | None = None


@dataclass(frozen=True)
class QualityResult:
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
    architecture: str
    num_codes: int
    window: int
    rows: list[SpeedRow]


@dataclass(frozen=True)
class TrainingPoint:
    seconds: float
    step: int
    bits_per_byte: float  # on held-out files


@dataclass(frozen=True)
class TrainingResult:
    model: str
    points: list[TrainingPoint]
    bytes_seen: int
