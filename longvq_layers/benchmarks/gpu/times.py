"""The times of the CUDA kernels against their peers, on the same GPU in the same run."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longvq_layers import ops
from longvq_layers.benchmarks.gpu.timing import Method, medians, peak_memory, table
from longvq_layers.models import SequenceClassifier, SequenceEncoder

_BACKENDS = {"cuda": ("native", "torch"), "cpu": ("torch",)}  # of ours, by device


def limits(device: str, quick: bool) -> Iterator[str]:
    """Copy bandwidth and the rate of bfloat16 matrix products."""
    size = 2**14 if quick else 2**30
    x = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = medians(device, {"copy": lambda: x.clone()})["copy"]
    yield f"copy: {2 * size / seconds / 1e12:.3f} TB/s"
    width = 64 if quick else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = medians(device, {"matmul": lambda: a @ b})["matmul"]
    yield f"bfloat16 matrix product of {width}: {2 * width**3 / seconds / 1e12:.1f} TFLOP/s"


def scan(device: str, quick: bool) -> Iterator[str]:
    """`ssm_scan` against the FFT convolution with a given kernel."""
    batch, channels, length, modes = (1, 8, 256, 4) if quick else (8, 1024, 16384, 32)
    u = torch.randn(batch, length, channels, device=device, dtype=torch.bfloat16)
    log_decay = torch.complex(
        -torch.rand(channels, modes, device=device) * 0.1, torch.randn(channels, modes, device=device)
    ).requires_grad_()
    weight = torch.randn(channels, modes, dtype=torch.complex64, device=device).requires_grad_()
    kernel = ops.ssm_kernel(log_decay.detach(), weight.detach(), length, backend="torch")
    rows = u.transpose(1, 2).contiguous()

    def convolve(u: Tensor) -> Tensor:
        kernel_f = torch.fft.rfft(kernel, 2 * length)
        return torch.fft.irfft(torch.fft.rfft(u.float(), 2 * length) * kernel_f, 2 * length)[..., :length].to(u.dtype)

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        def call(u: Tensor) -> Tensor:
            y = ops.ssm_scan(u, log_decay, weight, backend=backend)
            assert isinstance(y, Tensor)  # without return_state
            return y

        return call

    methods = {
        "fft, kernel given": Method(convolve, [rows]),
        **{f"ours, {b}": Method(ours(b), [u]) for b in _BACKENDS[device]},
    }
    copied = medians(device, {"copy": lambda: u.clone()})["copy"]
    yield f"B = {batch}, H = {channels}, L = {length}, d_state = {2 * modes}, bfloat16; copy: {copied * 1e3:.3f} ms\n"
    yield from table(device, methods, ["fft, kernel given"], lambda seconds: f"{copied / seconds:.1%} of copy")


def attention(device: str, quick: bool) -> Iterator[str]:
    """`vq_attention` against the fused attentions of PyTorch."""
    num_heads, head_dim, num_codes, window = (2, 16, 20, 16) if quick else (16, 128, 512, 128)
    codebook = torch.randn(num_heads, num_codes, head_dim, device=device)

    def ours(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: ops.vq_attention(
            q, k, v, codebook, causal=True, window=window, local_keys="exact", backend=backend
        )

    def fused(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    peers = {"flash": fused(SDPBackend.FLASH_ATTENTION), "cuDNN": fused(SDPBackend.CUDNN_ATTENTION)}
    if device == "cpu":
        peers = {"math": fused(SDPBackend.MATH)}
    for length in (128, 300) if quick else (1024, 4096, 16384, 65536):
        qkv = [torch.randn(1, num_heads, length, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)]
        backends = [b for b in _BACKENDS[device] if b == "native" or length <= 16384]
        calls = {**peers, **{f"ours, {b}": ours(b) for b in backends}}
        # Every query with every code and with half of the keys near its block, two products of 2 D FLOP each.
        work = 4 * num_heads * length * head_dim * (num_codes + window + 64)
        yield f"\nL = {length}, {num_heads} heads of {head_dim}, S = {num_codes}, causal, window {window}, bfloat16\n"
        methods = {name: Method(call, qkv) for name, call in calls.items()}
        yield from table(device, methods, list(peers), partial(_rate, work))


def _rate(work: float, seconds: float) -> str:
    return f"{work / seconds / 1e12:.1f} TFLOP/s of ours"


def step(device: str, quick: bool) -> Iterator[str]:
    """A training step of the byte classifier, bfloat16 autocast."""
    length, width = (128, 32) if quick else (4096, 256)
    tokens, target = torch.randint(256, (1, length), device=device), torch.zeros(1, dtype=torch.long, device=device)
    dense: dict[str, object] = {"d_ff": 4 * width, "attention": "dense"}
    blocks: dict[str, tuple[str, dict[str, object]]] = {
        "dense attention": ("transformer", dense),
        "fused attention": ("transformer", {"d_ff": 4 * width}),
    }
    for backend in _BACKENDS[device]:
        for recompute in (False, True):
            options: dict[str, object] = {"d_ff": 2 * width, "backend": backend, "recompute": recompute}
            blocks[f"longvq, {backend}{', recompute' * recompute}"] = ("longvq", options)
    models = {}
    for name, (block, options) in blocks.items():
        encoder = SequenceEncoder(num_inputs=256, d_model=width, depth=4, block=block, block_options=options)
        model = SequenceClassifier(encoder, 10).to(device)
        models[name] = (model, torch.optim.AdamW(model.parameters()))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(tokens).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    failed, steps = {}, {}
    for name, parts in models.items():
        try:
            train(*parts)
            steps[name] = partial(train, *parts)
        except Exception as error:  # the other models are still timed
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = medians(device, steps)
    yield f"4 layers, width {width}, L = {length}\n"
    yield "| model | ms a step | peak MB |\n|:---|---:|---:|"
    for name, call in steps.items():
        yield f"| {name} | {seconds[name] * 1e3:.2f} | {peak_memory(device, call) / 1e6:.1f} |"
    for name, reason in failed.items():
        yield f"| {name} | failed: {reason} | |"


def decode(device: str, quick: bool) -> Iterator[str]:
    """One token after a context."""
    num_heads, head_dim, num_codes, window = (2, 16, 8, 8) if quick else (16, 128, 512, 128)
    codebook = torch.randn(num_heads, num_codes, head_dim, device=device, dtype=torch.bfloat16)
    yield "| context | ms a token |\n|---:|---:|"
    for length in (32, 64) if quick else (4096, 65536):
        x = torch.randn(1, num_heads, length, head_dim, device=device, dtype=torch.bfloat16)
        state = ops.vq_attention_state(1, codebook, window=window, local_keys="exact")
        for piece in x.split(4096, 2):
            ops.vq_attention_step(piece, piece, piece, codebook, state)
        token = x[:, :, -1:]
        call = partial(ops.vq_attention_step, token, token, token, codebook, state)
        yield f"| {length:,} | {medians(device, {'token': call})['token'] * 1e3:.3f} |"


PARTS: dict[str, Callable[[str, bool], Iterator[str]]] = {
    "limits of the device": limits,
    "ssm_scan": scan,
    "vq_attention": attention,
    "a training step of LongVQ": step,
    "decoding": decode,
}
