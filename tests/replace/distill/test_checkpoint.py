"""Checkpoints of a distillation: a run continues exactly, and no other run uses its file."""

import pytest
import torch
from torch import nn

from longvq_layers.replace import replace_attention, restore_attention
from longvq_layers.replace.distill.api import distill_attention
from tests.replace.distill.cases import QUICK, replaced, same, snapshot


def test_a_killed_run_continues_with_the_same_curve(tmp_path):
    options = {**QUICK, "end_to_end": 8, "projections": True, "patience": 20}
    model, data = replaced()
    whole = distill_attention(model, data, **options)
    seen = []

    def kill(point) -> None:
        seen.append(point)
        if len(seen) in (3, 6):
            raise KeyboardInterrupt

    other, _ = replaced()
    before = snapshot(other)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill_attention(other, data, **options, checkpoint=tmp_path / "run.pt", progress=kill)
        assert same(snapshot(other), before)
    resumed = distill_attention(other, data, **options, checkpoint=tmp_path / "run.pt")
    assert [str(point) for point in resumed.curve] == [str(point) for point in whole.curve]
    assert (resumed.before, resumed.after, resumed.steps) == (whole.before, whole.after, whole.steps)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    again = distill_attention(replaced()[0], data, **options, checkpoint=tmp_path / "run.pt")
    assert again.after == whole.after
    with pytest.raises(ValueError, match=r"checkpoint must be of the same run, .* is of a run with another lr"):
        distill_attention(other, data, **options, lr=0.5, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere/run.pt", None, "nowhere is none"),
        (".", None, "this is a folder"),
        ("notes.txt", b"not a checkpoint", "can't be read"),
        ("empty.pt", b"", "can't be read"),
        ("weights.pt", {"weight": torch.ones(2)}, "that distill_attention wrote, .* is not one"),
    ],
)
def test_an_unusable_checkpoint_is_refused_before_anything_runs(tmp_path, name, content, message):
    model, data = replaced()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"distill_attention: checkpoint must be a file .*{message}"):
        distill_attention(model, data, checkpoint=tmp_path / name)
    with pytest.raises(TypeError, match="distill_attention: checkpoint must be a path, got int"):
        distill_attention(model, data, checkpoint=3)


def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path):
    options = {**QUICK, "projections": True, "checkpoint": tmp_path / "run.pt"}
    model, data = replaced()
    distill_attention(model, data, **options)
    other, _ = replaced()
    with torch.no_grad():
        next(other.parameters())[3] += 0.1
    before = snapshot(other)
    with pytest.raises(ValueError, match="is of a run with another model"):
        distill_attention(other, data, **options)
    assert same(snapshot(other), before)
    fresh, _ = replaced()
    with pytest.raises(ValueError, match="is of a run with another data"):
        distill_attention(fresh, data[::-1], **options)
    restore_attention(fresh)
    replace_attention(fresh, num_codes=8, window=5, calibration=data[:1])  # another metric of the queries
    with pytest.raises(ValueError, match="is of a run with another model"):
        distill_attention(fresh, data, **options)


@pytest.mark.parametrize("change", ["distilled", "rounding", "masks"])
def test_a_checkpoint_of_the_same_run_is_used(change, tmp_path):
    options = {**QUICK, "projections": True, "checkpoint": tmp_path / "run.pt"}
    model, data = replaced("encoder" if change == "masks" else "bert")
    if change == "masks":  # masks of 0 and -inf
        mask = nn.Transformer.generate_square_subsequent_mask(61)
        data = [{"src": x, "mask": mask} for x in data]
    expected = distill_attention(model, data, **options)
    if change == "rounding":
        model, _ = replaced()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
    assert distill_attention(model, data, **options).before == expected.before
    if change == "masks":
        turned = [{**batch, "src": batch["src"].flip(1)} for batch in data]  # the same numbers in another order
        with pytest.raises(ValueError, match="is of a run with another data"):
            distill_attention(model, turned, **options)
