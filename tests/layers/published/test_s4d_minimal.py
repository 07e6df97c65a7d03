"""Checkpoints of the public minimal S4D layer: equal outputs, and errors that name the tensor."""

import copy

import pytest
import torch
from torch import nn

from longvq_layers.layers import S4DLayer
from tests.tolerances import assert_close

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Kernel(nn.Module):
    def __init__(self, width, modes, frozen):
        super().__init__()
        draws = {
            "log_dt": torch.empty(width).uniform_(-6.9, -2.3),
            "log_A_real": torch.randn(width, modes) * 0.5 - 0.7,
            "A_imag": torch.randn(width, modes) * 10,
        }
        for name, values in draws.items():
            if frozen:
                self.register_buffer(name, values)
            else:
                self.register_parameter(name, nn.Parameter(values))
        self.C = nn.Parameter(torch.randn(width, modes, 2))

    def forward(self, length):
        pole = torch.complex(-self.log_A_real.exp(), self.A_imag)
        scaled = pole * self.log_dt.exp()[:, None]
        coefficient = torch.complex(*self.C.unbind(-1)) * (scaled.exp() - 1) / pole
        vandermonde = (scaled[..., None] * torch.arange(length)).exp()  # (H N L)
        return 2 * torch.einsum("hn,hnl->hl", coefficient, vandermonde).real


class Minimal(nn.Module):
    """The public layer, written again: (B, H, L) -> (B, H, L), parameters named as in the public code."""

    def __init__(self, width, modes, frozen=False):
        super().__init__()
        self.D = nn.Parameter(torch.randn(width))
        self.kernel = Kernel(width, modes, frozen)
        self.output_linear = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(1))

    def forward(self, u):
        length = u.shape[-1]
        spectra = torch.fft.rfft(self.kernel(length), n=2 * length) * torch.fft.rfft(u, n=2 * length)
        y = torch.fft.irfft(spectra, n=2 * length)[..., :length] + u * self.D[:, None]
        return self.output_linear(nn.functional.gelu(y))


@each_dtype
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("prefix", ["", "layers.3."])
def test_same_outputs(dtype, frozen, prefix):
    public = Minimal(5, 7, frozen).to(dtype)
    model = public if not prefix else nn.Module()
    if prefix:
        model.layers = nn.ModuleList([*(Minimal(5, 7) for _ in range(3)), public, Minimal(4, 2)])
        model.decoder = nn.Linear(5, 2)
    layer = S4DLayer.from_minimal(model.state_dict(), prefix, trained=() if frozen else ("A", "dt"))
    x = torch.randn(3, 150, 5, dtype=dtype)
    expected = copy.deepcopy(public).double()(x.double().mT).mT
    assert_close(layer(x), expected, "output")
    assert_close(public(x.mT).mT, expected, "the public one")
    assert layer.out_proj.weight.dtype == layer.ssm.C.dtype == dtype
    assert {n.removeprefix("ssm.") for n, _ in layer.named_buffers()} == {n for n, _ in public.kernel.named_buffers()}
    with torch.no_grad():
        state = layer.initial_state(3)
        for t in range(20):
            y, state = layer.step(x[:, t], state)
            assert_close(y, expected[:, t], f"step {t}")


def test_same_gradients():
    public = Minimal(4, 3).double()
    layer = S4DLayer.from_minimal(public.state_dict())
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    (layer(x) ** 2).sum().backward()
    (public(x.mT) ** 2).sum().backward()
    ssm, kernel = layer.ssm, public.kernel
    for name in ("log_dt", "log_A_real", "A_imag", "C"):
        assert_close(getattr(ssm, name).grad, getattr(kernel, name).grad, name)
    assert_close(ssm.D.grad, public.D.grad, "D")
    assert_close(layer.out_proj.weight.grad, public.output_linear[0].weight.grad[..., 0], "weight")


def test_options_and_independence():
    public = Minimal(4, 3)
    before = copy.deepcopy(public.state_dict())
    layer = S4DLayer.from_minimal(
        public.state_dict(), dropout=0.25, trained=("B",), backend="torch", dtype=torch.float64
    )
    assert layer.training and layer.dropout.p == 0.25 and layer.ssm.backend == "torch" and layer.ssm.causal
    assert layer.ssm.C.dtype == layer.out_proj.weight.dtype == torch.float64
    assert torch.equal(layer.ssm.B, torch.tensor([1.0, 0.0]).expand(4, 3, 2))
    x = torch.randn(2, 20, 4)
    assert_close(layer.eval()(x.double()), public(x.mT).mT, "output", torch.float32)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.add_(1)
    for key, value in public.state_dict().items():
        assert torch.equal(value, before[key]), key
    half = S4DLayer.from_minimal(public.bfloat16().state_dict())
    assert half.out_proj.weight.dtype == torch.bfloat16 and half.ssm.C.dtype == torch.float32


def test_wrong_checkpoints_are_named():
    good = Minimal(4, 3).state_dict()
    lacking = {k: v for k, v in good.items() if k not in ("D", "kernel.C")}
    with pytest.raises(
        ValueError,
        match=r"^S4DLayer\.from_minimal: state_dict must have D, kernel\.C, got.* prefix='' right",
    ):
        S4DLayer.from_minimal(lacking)
    with pytest.raises(ValueError, match=r"must have layers\.3D, .*is prefix='layers\.3' right"):
        S4DLayer.from_minimal({f"layers.3.{k}": v for k, v in good.items()}, "layers.3")
    with pytest.raises(ValueError, match=r"only the keys of the minimal S4D layer, got l\.kernel\.B"):
        S4DLayer.from_minimal({"l.kernel.B": torch.ones(4, 3)} | {f"l.{k}": v for k, v in good.items()}, "l.")
    for key, shape, text in (
        ("D", (5,), r"D must have shape \(H\) = \(4,\), got \(5,\)"),
        ("kernel.log_dt", (4, 1), r"kernel\.log_dt must have 1 dimensions \(H\), got 2: \(4, 1\)"),
        ("kernel.log_A_real", (4, 2), r"kernel\.log_A_real must have shape \(H, N\) = \(4, 3\), got \(4, 2\)"),
        ("kernel.C", (2, 3, 2), r"kernel\.C must have shape \(H, N, 2\) = \(4, 3, 2\), got \(2, 3, 2\)"),
        ("output_linear.0.weight", (4, 4, 1), r"weight must have shape \(2H, H, 1\) = \(8, 4, 1\), got \(4, 4, 1\)"),
        ("output_linear.0.bias", (4,), r"bias must have shape \(2H\) = \(8,\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            S4DLayer.from_minimal(good | {key: torch.zeros(shape)})
    with pytest.raises(TypeError, match=r"kernel\.C must be a real floating-point tensor, got torch\.complex64"):
        S4DLayer.from_minimal(good | {"kernel.C": torch.zeros(4, 3, 2, dtype=torch.complex64)})
    with pytest.raises(TypeError, match=r"D must be a torch\.Tensor \(H\), got list"):
        S4DLayer.from_minimal(good | {"D": [0.0] * 4})
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got Minimal"):
        S4DLayer.from_minimal(Minimal(4, 3))
    with pytest.raises(TypeError, match="prefix must be a str, got int"):
        S4DLayer.from_minimal(good, 3)
