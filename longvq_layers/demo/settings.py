"""Every number of the full and the quick demo."""

from dataclasses import dataclass, field

PARTS = ("quality", "speed", "training")


@dataclass(frozen=True)
class QualitySettings:
    """Part 1. ``pairs`` are (codes, window), ``targets`` their mean cosines in a first measurement."""

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
    seconds_per_length: float = 4.0  # of timed forwards, but at least three of each model
    most_repeats: int = 15
    calibration_tokens: int = 2048


@dataclass(frozen=True)
class TrainingSettings:
    """Part 3: a byte language model."""

    seconds: float = 55.0  # of training steps; about a minute with the evaluations
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
    """All parts of the demo."""

    quality: QualitySettings = field(default_factory=QualitySettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def quick() -> Settings:
    """Every part in miniature, to test that it runs; the figures mean little."""
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
