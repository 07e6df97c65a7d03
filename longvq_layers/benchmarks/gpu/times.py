"""What the CUDA kernels take against their peers on the same GPU in the same run: CUDA events, interleaved, medians."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longvq_layers import ops
from longvq_layers.models import SequenceClassifier, SequenceEncoder

_ROUNDS = 7
_OUR_BACKENDS = ("native", "torch")


def limits(device: str, quick: bool) -> Iterator[str]:
    """Copy bandwidth and rate of bfloat16 matrix products, which the others are compared with."""
    size = 2**14 if quick else 2**30
    x = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = medians(device, {"copy": lambda: x.clone()})["copy"]
    yield f"copy: {2 * size / seconds / 1e12:.3f} TB/s"
    width = 64 if quick else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = medians(device, {"matmul": lambda: a @ b})["matmul"]
    yield f"bfloat16 matrix product of {width}: {2 * width**3 / seconds / 1e12:.1f} TFLOP/s"


def scan(device: str, quick: bool) -> Iterator[str]:
    batch, channels, length, modes = (1, 8, 256, 4) if quick else (8, 1024, 16384, 32)
    u = torch.randn(batch, length, channels, device=device, dtype=torch.bfloat16)
    log_decay = torch.complex(
        -torch.rand(channels, modes, device=device) * 0.1, torch.randn(channels, modes, device=device)
    ).requires_grad_()
    weight = torch.randn(channels, modes, dtype=torch.complex64, device=device).requires_grad_()
    kernel = ops.ssm_kernel(log_decay.detach(), weight.detach(), length, backend="torch")
    rows = u.transpose(1, 2).contiguous()

    def convolve(u):
        kernel_f = torch.fft.rfft(kernel, 2 * length)
        return torch.fft.irfft(torch.fft.rfft(u.float(), 2 * length) * kernel_f, 2 * length)[..., :length].to(u.dtype)

    def ours(backend):
        return lambda u: ops.ssm_scan(u, log_decay, weight, backend=backend)

    methods = {"fft, kernel given": (convolve, rows), **{f"ours, {b}": (ours(b), u) for b in _backends(device)}}
    copied = medians(device, {"copy": lambda: u.clone()})["copy"]
    yield f"B = {batch}, H = {channels}, L = {length}, d_state = {2 * modes}, bfloat16; copy: {copied * 1e3:.3f} ms\n"
    yield from _table(device, methods, lambda seconds: f"{copied / seconds:.1%} of copy", "fft, kernel given")


def attention(device: str, quick: bool) -> Iterator[str]:
    heads, width, codes, window = (2, 16, 20, 16) if quick else (16, 128, 512, 128)
    codebook = torch.randn(heads, codes, width, device=device)

    def ours(backend: str) -> Callable:
        options = {"causal": True, "window": window, "local_keys": "exact", "backend": backend}
        return lambda *qkv: ops.vq_attention(*qkv, codebook, **options)

    def fused(backend: SDPBackend) -> Callable:
        def call(*qkv):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*qkv, is_causal=True)

        return call

    peers = {"flash": fused(SDPBackend.FLASH_ATTENTION), "cuDNN": fused(SDPBackend.CUDNN_ATTENTION)}
    if device == "cpu":
        peers = {"math": fused(SDPBackend.MATH)}
    for length in (128, 300) if quick else (1024, 4096, 16384, 65536):
        qkv = [torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
        backends = [b for b in _backends(device) if b == "native" or length <= 16384]
        methods = {**peers, **{f"ours, {b}": ours(b) for b in backends}}
        # Every query with every code and with half of the keys near its block, two products of 2 D FLOP each.
        work = 4 * heads * length * width * (codes + window + 64)
        yield f"\nL = {length}, {heads} heads of {width}, S = {codes}, causal, window {window}, bfloat16\n"
        yield from _table(
            device,
            {name: (call, *qkv) for name, call in methods.items()},
            lambda s, work=work: f"{work / s / 1e12:.1f} TFLOP/s of ours",
            *peers,
        )


def step(device: str, quick: bool) -> Iterator[str]:
    """A training step of the byte classifier, bfloat16 autocast."""
    length, width = (128, 32) if quick else (4096, 256)
    tokens, target = torch.randint(256, (1, length), device=device), torch.zeros(1, dtype=torch.long, device=device)
    models = {}
    for name, block, options in (
        ("dense attention", "transformer", {"d_ff": 4 * width, "attention": "dense"}),
        ("fused attention", "transformer", {"d_ff": 4 * width}),
        *(
            (
                f"longvq, {backend}{', recompute' * more}",
                "longvq",
                {"d_ff": 2 * width, "backend": backend, "recompute": more},
            )
            for backend in _backends(device)
            for more in (False, True)
        ),
    ):
        encoder = SequenceEncoder(num_inputs=256, d_model=width, depth=4, block=block, block_options=options)
        model = SequenceClassifier(encoder, 10).to(device)
        models[name] = (model, torch.optim.AdamW(model.parameters()))

    def train(model, optimizer):
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(tokens).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    failed = {}
    for name, model in models.items():
        try:
            train(*model)
        except Exception as error:  # the others are of interest nevertheless
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    models = {name: model for name, model in models.items() if name not in failed}
    seconds = medians(device, {name: lambda m=m: train(*m) for name, m in models.items()})
    yield f"4 layers, width {width}, L = {length}\n"
    yield "| model | ms a step | peak MB |\n|:---|---:|---:|"
    for name, model in models.items():
        yield f"| {name} | {seconds[name] * 1e3:.2f} | {_peak(device, lambda m=model: train(*m)) / 1e6:.1f} |"
    for name, reason in failed.items():
        yield f"| {name} | failed: {reason} | |"


def decode(device: str, quick: bool) -> Iterator[str]:
    heads, width, codes, window = (2, 16, 8, 8) if quick else (16, 128, 512, 128)
    codebook = torch.randn(heads, codes, width, device=device, dtype=torch.bfloat16)
    yield "| context | ms a token |\n|---:|---:|"
    for length in (32, 64) if quick else (4096, 65536):
        x = torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16)
        state = ops.vq_attention_state(1, codebook, window=window, local_keys="exact")
        for piece in x.split(4096, 2):
            ops.vq_attention_step(piece, piece, piece, codebook, state)
        token = x[:, :, -1:]
        call = lambda s=state, t=token: ops.vq_attention_step(t, t, t, codebook, s)  # noqa: E731
        yield f"| {length:,} | {medians(device, {'token': call})['token'] * 1e3:.3f} |"


PARTS: dict[str, Callable[[str, bool], Iterator[str]]] = {
    "limits of the device": limits,
    "ssm_scan": scan,
    "vq_attention": attention,
    "a training step of LongVQ": step,
    "decoding": decode,
}


def medians(device: str, calls: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds of each call, taking turns, after two that don't count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            seconds = _seconds(device, call)
            if round_ > 1:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(device: str, call: Callable[[], object]) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _peak(device: str, call: Callable[[], object]) -> float:
    if device == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _backends(device: str) -> tuple[str, ...]:
    return _OUR_BACKENDS if device != "cpu" else _OUR_BACKENDS[1:]


def _table(device: str, methods: dict, describe: Callable[[float], str], *peers: str) -> Iterator[str]:
    """Forward, and forward with backward, of methods (call, *inputs), which may fail, against the fastest peer."""
    yield "| method | pass | ms | against the peer | |\n|:---|:---|---:|---:|:---|"
    for backward in (False, True):
        calls, failed = {}, {}
        for name, (call, *inputs) in methods.items():
            run = _training(call, inputs) if backward else lambda call=call, inputs=inputs: call(*inputs)
            try:
                run()
                calls[name] = run
            except Exception as error:  # a peer that this GPU or torch doesn't have, a kernel that doesn't run
                failed[name] = error
        with torch.no_grad() if not backward else torch.enable_grad():
            seconds = medians(device, calls)
        best = min((seconds[name] for name in peers if name in seconds), default=float("nan"))
        what = "forward + backward" if backward else "forward"
        for name in methods:
            if name in failed:
                yield f"| {name} | {what} | failed: {type(failed[name]).__name__}: {str(failed[name])[:200]} | | |"
                continue
            note = describe(seconds[name]) if not backward and name not in peers else ""
            yield f"| {name} | {what} | {seconds[name] * 1e3:.3f} | {best / seconds[name]:.2f}x | {note} |"


def _training(call: Callable, inputs: list) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = None

    def run():
        nonlocal grad
        out = call(*leaves)
        grad = torch.ones_like(out) if grad is None else grad
        return torch.autograd.grad(out, leaves, grad)

    return run
