"""The keys that a recorder keeps are a uniform sample of all that it saw."""

import torch

from longvq_layers.replace.calibration.recorder import Recorder


def test_calibration_samples_when_there_are_many_keys(monkeypatch):
    recorder = Recorder(keys_per_head=50)
    for step in range(20):
        k = torch.full((2, 1, 10, 3), float(step))
        recorder.observe(k, k, k, k, causal=False, key_padding_mask=None, scale=None)
    assert recorder.keys.shape == (1, 50, 3) and recorder.queries == 400
    assert len(recorder.keys[0, :, 0].unique()) > 12  # from all parts of the data
    torch.testing.assert_close(recorder.moment / 400, torch.full((1, 3, 3), sum(i**2 for i in range(20)) / 20).double())
