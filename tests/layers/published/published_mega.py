"""One layer of the public Mega code, written again from the paper's equations: slow, dense and in float64.

Facts about the public code (names, shapes, order of operations) were read there; nothing was taken from it. Batches
come first here, (B, L, D); everything else is as published.
"""

import math

import torch
from torch import Tensor

EPS = 1e-5


def random_state(
    width=6,
    attn=4,
    value=5,
    ffn=7,
    averages=3,
    *,
    causal=False,
    bias="simple",
    positions=16,
    norm_type="layer",
    prefix="",
) -> dict[str, Tensor]:
    """A checkpoint with the names and shapes of the public code, and large values so that each tensor matters."""
    kernels = width if causal else 2 * width
    shapes = {
        "mega_layer.move.delta": (kernels, averages, 1),
        "mega_layer.move.alpha": (kernels, averages, 1),
        "mega_layer.move.beta": (kernels, averages, 1),
        "mega_layer.move.gamma": (kernels, averages),
        "mega_layer.move.omega": (width,),
        "mega_layer.v_proj.weight": (value, width),
        "mega_layer.v_proj.bias": (value,),
        "mega_layer.mx_proj.weight": (attn + value + 2 * width, width),
        "mega_layer.mx_proj.bias": (attn + value + 2 * width,),
        "mega_layer.h_proj.weight": (width, value),
        "mega_layer.h_proj.bias": (width,),
        "mega_layer.gamma": (2, attn),
        "mega_layer.beta": (2, attn),
    }
    if bias == "simple":
        shapes["mega_layer.rel_pos_bias.rel_pos_bias"] = (2 * positions - 1,)
    else:
        shapes["mega_layer.rel_pos_bias.alpha"] = (1, attn)
        shapes["mega_layer.rel_pos_bias.beta"] = (1, attn)
        shapes["mega_layer.rel_pos_bias._float_tensor"] = (1,)
    if ffn:
        shapes |= {"nffn.fc1.weight": (ffn, width), "nffn.fc1.bias": (ffn,)}
        shapes |= {"nffn.fc2.weight": (width, ffn), "nffn.fc2.bias": (width,)}
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    names = {"layer": ("weight", "bias"), "rms": ("weight",), "scale": ("scalar",)}
    names["batch"] = ("weight", "bias", "running_mean", "running_var")
    for part in ("mega_layer", "nffn") if ffn else ("mega_layer",):
        for name in names[norm_type]:
            shape = 1 if name == "scalar" else width
            state[f"{part}.norm.norm.{name}"] = 0.5 + torch.rand(shape, dtype=torch.float64)
        if norm_type == "batch":
            state[f"{part}.norm.norm.num_batches_tracked"] = torch.tensor(3)
    return {prefix + name: value for name, value in state.items()}


def norm(state: dict, at: str, kind: str, x: Tensor) -> Tensor:
    """Over the last axis; batch norm as in eval mode."""
    p = {name: state.get(f"{at}.norm.norm.{name}") for name in ("weight", "bias", "scalar", "running_mean")}
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * p["weight"] + p["bias"]
    if kind == "batch":
        var = state[f"{at}.norm.norm.running_var"]
        return (x - p["running_mean"]) / (var + EPS).sqrt() * p["weight"] + p["bias"]
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (p["weight"] if kind == "rms" else p["scalar"])


def ema(state: dict, x: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """silu of the moving average of x (B, L, D), eq. 2 to 5: one term per pair of positions."""
    at = "mega_layer.move."
    p, q = state[at + "delta"].sigmoid(), 1 - state[at + "delta"].sigmoid() * state[at + "alpha"].sigmoid()
    length, width, averages = x.shape[1], x.shape[2], q.shape[1]
    readout = (p * state[at + "beta"])[..., 0] * state[at + "gamma"] / math.sqrt(averages)
    kernel = torch.stack([(readout * q[..., 0] ** lag).sum(1) for lag in range(length)], dim=1)  # (D or 2D, L)
    y = x * state[at + "omega"]
    x = x * ~mask.unsqueeze(-1)
    rows = []
    for t in range(length):
        total = y[:, t]
        for s in range(t + 1):
            total = total + kernel[:width, t - s] * x[:, s]
        for s in range(t, 0 if causal else length):  # both directions count the present
            total = total + kernel[width:, s - t] * x[:, s]
        rows.append(total)
    return torch.nn.functional.silu(torch.stack(rows, dim=1))


def position_bias(state: dict, length: int) -> Tensor:
    """(length, length), row = query."""
    at = "mega_layer.rel_pos_bias."
    bias = torch.empty(length, length, dtype=torch.float64)
    if at + "rel_pos_bias" in state:
        table = state[at + "rel_pos_bias"]
        for i in range(length):
            for j in range(length):
                bias[i, j] = table[(len(table) - 1) // 2 + j - i]
        return bias

    def rotated(x, position):
        first, second = x[0].chunk(2)
        half = len(first)
        angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

    for i in range(length):
        for j in range(length):
            bias[i, j] = rotated(state[at + "alpha"], i) @ rotated(state[at + "beta"], j)
    return bias


def attend(state: dict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, activation: str) -> Tensor:
    """One chunk, (B, C, ·)."""
    length = q.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length).bool()
    allowed = past & ~mask.unsqueeze(1)
    bias = position_bias(state, length)
    scores = q @ k.transpose(1, 2)
    if activation == "softmax":
        weights = (scores / math.sqrt(q.shape[-1]) + bias).masked_fill(~allowed, -math.inf).softmax(-1)
        return weights.nan_to_num() @ v
    # A causal layer divides by the number of positions up to the query, a bidirectional one by that of unmasked keys.
    count = past.sum(-1, keepdim=True) if causal else (~mask).sum(-1).clamp(min=1).view(-1, 1, 1)
    scores = scores / count + bias
    if activation == "relu2":
        weights = scores.clamp(min=0) ** 2
    else:
        weights = (1 + torch.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2)))) / 2
    return weights.masked_fill(~allowed, 0) @ v


def layer(
    state: dict,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    chunk=None,
    causal=False,
    activation="softmax",
    norm_place="pre",
    norm_type="layer",
    ffn_activation=torch.nn.functional.silu,
) -> Tensor:
    """The layer's output for x (B, L, D) float64 and mask (B, L), True = padding; no dropout."""
    silu = torch.nn.functional.silu
    mask = torch.zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask
    pre = norm_place == "pre"
    normed = norm(state, "mega_layer", norm_type, x) if pre else x

    def linear(name, x):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    v = silu(linear("mega_layer.v_proj", normed))
    width, attn, value = x.shape[-1], state["mega_layer.gamma"].shape[1], v.shape[-1]
    base = linear("mega_layer.mx_proj", ema(state, normed, mask, causal))
    update = base[..., :width].sigmoid()
    z = silu(base[..., width : width + attn])
    reset = silu(base[..., width + attn : width + attn + value])
    candidate = base[..., width + attn + value :]
    q = z * state["mega_layer.gamma"][0] + state["mega_layer.beta"][0]
    k = z * state["mega_layer.gamma"][1] + state["mega_layer.beta"][1]
    size = chunk or x.shape[1]
    pieces = [slice(start, start + size) for start in range(0, x.shape[1], size)]
    out = torch.cat([attend(state, q[:, s], k[:, s], v[:, s], mask[:, s], causal, activation) for s in pieces], dim=1)
    h = silu(candidate + linear("mega_layer.h_proj", out * reset))
    y = update * h + (1 - update) * x
    if not pre:
        y = norm(state, "mega_layer", norm_type, y)
    if "nffn.fc1.weight" not in state:
        return y
    normed = norm(state, "nffn", norm_type, y) if pre else y
    y = y + linear("nffn.fc2", ffn_activation(linear("nffn.fc1", normed)))
    return y if pre else norm(state, "nffn", norm_type, y)
