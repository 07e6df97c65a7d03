"""Fit the codebooks to the keys that a model really makes, and measure what quantising them costs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from longvq_layers.replace.distill.teacher_student import call
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.context import Call, Far
from longvq_layers.replace.slot.key_importance import attention_received
from longvq_layers.replace.slot.swapped import SwappedAttention

KEYS_PER_HEAD = 20_480  # kept per layer and head for k-means; more keys only cost time and memory
GAINS = (1.0, 0.5, 0.25, 0.0)  # that are tried on the spread of the codes, per head
SEED = 0x10C6  # calibration draws from generators of its own and leaves the global ones alone


class CallRefused(NotImplementedError):
    """A call during calibration that a replaced module couldn't serve; `site` is the module's name."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(reason)
        self.site = site


class Recorder(nn.Module):
    """Stands where a swapped attention will stand, while the model still uses its original attention.

    It first collects keys, the attention they receive, and the second moment of the queries. Then (once `candidate` is
    set) it measures on the same inputs how far the candidate's output is from the original one, with every gain on the
    spread of the codes, and `choose_gains` keeps the best of each head.

    Args:
        original: the attention function that a transformers module would call by itself; None for
            nn.MultiheadAttention.
        name: of the module in the model, for errors.
        rotary: how the positions are to be taken off queries and keys; the first call settles whether it can be.
        may_stay_rotated: whether the positions stay where it can't be; else the call raises.
        keys_per_head: keys kept, a uniform sample of all that were seen.
        window: in which keys are exact, so that the attention they receive there doesn't count. Default 0.
    """

    def __init__(
        self,
        original: Callable | None = None,
        name: str = "",
        *,
        rotary: ClampedRotary | None = None,
        may_stay_rotated: bool = False,
        keys_per_head: int = KEYS_PER_HEAD,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.original = original
        self.name = name
        self.rotary, self.may_stay_rotated = rotary, may_stay_rotated
        self.why_rotated: str | None = None
        self.has_positions = True  # until a call shows that its keys don't depend on them
        self.calls: dict[int, Call] = {}
        self.checked: set[bool] = set()  # whether an adapter was compared with its module, without and with padding
        self.causal: set[bool] = set()  # what its calls were; of one token they are both
        self.batch = 0  # the calibration input that is being run, for errors
        self.candidate: list[SwappedAttention] = []  # in a list: not a submodule
        self._limit, self._window = keys_per_head, window
        self._generator = torch.Generator().manual_seed(SEED)
        self._rank = torch.empty(0)  # (N,) random rank of each kept token; the lowest stay: a uniform sample
        self.sizes: tuple[int, int, int] | None = None  # H, Hkv, D
        self.keys: Tensor | None = None  # (Hkv, N, D)
        self.weight: Tensor | None = None  # (Hkv, N) attention that each key receives
        self.moment: Tensor | None = None  # (Hkv, D, D) float64, sum of q qᵀ
        self.queries = 0  # per key-value head
        self._sums = {"output": 0.0, "key_error": 0.0, "keys": 0}
        self._output_errors: Tensor | float = 0.0  # (gains, H) float64, square errors
        self._key_square = self._key_sum = 0.0

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Around a call of this module: a NotImplementedError gets its name."""
        try:
            yield
        except CallRefused:
            raise
        except NotImplementedError as error:
            raise CallRefused(self.name, str(error)) from error

    @torch.no_grad()
    def observe(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        *,
        far: Far | None = None,
        causal: bool,
        key_padding_mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), output (B, H, L, E) of the original attention.

        `far`: what stands for q and k outside the window, if that is something else.

        Raises:
            NotImplementedError: not one key per query. ValueError: NaN or infinity in a token that isn't padding.
        """
        if q.shape[2] != k.shape[2]:
            raise NotImplementedError(
                f"replace_attention: calibration: got {q.shape[2]} queries for {k.shape[2]} keys; expected whole "
                "sequences without a cache from earlier calls"
            )
        if q.shape[2] > 1:
            self.causal.add(causal)
        real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        if key_padding_mask is not None:
            real = ~key_padding_mask
        self._check_finite(real, queries=q, keys=k, values=v)
        if self.candidate:
            self._measure(q, k, v, output, real, far=far, causal=causal, scale=scale)
        else:
            self.sizes = (q.shape[1], k.shape[1], k.shape[3])
            received = attention_received(q, k, real, window=self._window, causal=causal, scale=scale)
            self._collect(*((q, k) if far is None else far), received, real)

    def errors(self) -> tuple[float, float]:
        """Share of the keys' variance that the codes miss, and relative error of the attention output."""
        sums = self._sums
        count = max(sums["keys"], 1)
        variance = (self._key_square - self._key_sum.square() / count).sum().item() if sums["keys"] else 0.0
        key_error = 0.0 if variance <= 0 else sums["key_error"] / variance  # NaN stays NaN
        error = self._output_errors.amin(0).sum().item() if sums["keys"] else 0.0
        return key_error, 0.0 if sums["output"] == 0 else (error / sums["output"]) ** 0.5

    def measure_anew(self, candidate: SwappedAttention) -> None:
        """Forget what was measured; from now on measure this one."""
        self.candidate = [candidate]
        self._sums = {"output": 0.0, "key_error": 0.0, "keys": 0}
        self._output_errors = self._key_square = self._key_sum = 0.0

    @torch.no_grad()
    def choose_gains(self) -> None:
        """Give every head of the candidate the gain that was nearest to the original; without one, leave it."""
        gain = self.candidate[0].spread_gain
        if isinstance(self._output_errors, Tensor) and len(self._output_errors) > 1:
            gain.copy_(gain.new_tensor(GAINS)[self._output_errors.argmin(0).to(gain.device)])

    def _check_finite(self, real: Tensor, **tensors: Tensor) -> None:
        for what, x in tensors.items():
            if not (x.isfinite().all(-1) | ~real[:, None]).all():
                raise ValueError(
                    f"replace_attention: calibration: batch {self.batch} gave non-finite {what} (NaN or infinity) in "
                    f"{self.name or 'the model itself'}; check this input and the weights"
                )

    def _collect(self, q: Tensor, k: Tensor, received: Tensor, real: Tensor) -> None:
        keys = k.transpose(0, 1)[:, real].to(torch.promote_types(k.dtype, torch.float32))  # (Hkv, N, D)
        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (k.shape[1], group)).permute(1, 0, 3, 2, 4)[:, real].flatten(1, 2).double()
        moment = queries.transpose(1, 2) @ queries
        self.moment = moment if self.moment is None else self.moment + moment
        self.queries += queries.shape[1]
        weight = received.transpose(0, 1)[:, real]  # (Hkv, N)
        rank = torch.rand(keys.shape[1], generator=self._generator)
        if self.keys is not None:
            keys, rank = torch.cat([self.keys, keys], dim=1), torch.cat([self._rank, rank])
            weight = torch.cat([self.weight, weight], dim=1)
        if rank.numel() > self._limit:
            rank, kept = rank.topk(self._limit, largest=False)
            keys, weight = keys[:, kept.to(keys.device)], weight[:, kept.to(keys.device)]
        self.keys, self.weight, self._rank = keys, weight, rank

    def _measure(self, q, k, v, output, real: Tensor, *, far: Far | None, causal: bool, scale: float | None) -> None:
        candidate = self.candidate[0]
        rows, errors = real[:, None, :, None], []
        for gain in GAINS if candidate.variance_correction else GAINS[:1]:
            candidate.spread_gain.fill_(gain)
            swapped = candidate(q, k, v, ~real, far=far, causal=causal, scale=scale)
            errors.append(((swapped - output) * rows).double().square().sum((0, 2, 3)))
        self._output_errors = self._output_errors + torch.stack(errors)
        self._sums["output"] += (output * rows).double().square().sum().item()
        keys = candidate.in_metric(k if far is None else far[1])  # (B, Hkv, L, D)
        codes = candidate.codebook(keys, ~real)
        index = codes.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        coded = candidate.codebook.embedding.gather(1, index)  # (Hkv, B·L, D)
        keys, mask = keys.transpose(0, 1).flatten(1, 2).double(), real.flatten()[None, :, None]
        self._sums["key_error"] += ((keys - coded) * mask).square().sum().item()
        self._sums["keys"] += int(real.sum())
        self._key_square = self._key_square + (keys * mask).square().sum(1)
        self._key_sum = self._key_sum + (keys * mask).sum(1)


def check_iterable(calibration: Iterable, what: str = "replace_attention: calibration") -> None:
    """Check the type of the calibration inputs as a whole, without taking any.

    Raises:
        TypeError: one input instead of an iterable, or no iterable.
    """
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"{what}: got {type(calibration).__name__}, expected an iterable of model inputs; wrap one input in a "
            f"list: {what.split()[-1]}=[batch], a map-style Dataset in a DataLoader"
        )


def as_batches(calibration: Iterable, what: str = "replace_attention: calibration") -> list:
    """The inputs as a list, checked; `what` they are, for errors.

    Raises:
        TypeError: an input that is no tensor, tuple or dict. ValueError: none at all.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError(f"{what}: got no input, expected at least one; is it a used-up iterator?")
    for batch in batches:
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
            raise TypeError(
                f"{what}: got an input of type {type(batch).__name__}, expected a tensor, a tuple of positional "
                "arguments or a dict of keyword arguments"
            )
    return batches


def run(model: nn.Module, batches: list, recorders: Iterable[Recorder] = ()) -> None:
    """Every batch through the model, in eval mode and without gradients; the modes are put back."""
    with _evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches):
            for recorder in recorders:
                recorder.batch = number
            call(model, batch)


def fit(recorder: Recorder, seam: SwappedAttention) -> None:
    """Fit `seam` to what the recorder collected, and let the recorder measure it from now on."""
    generator = torch.Generator(device=recorder.keys.device).manual_seed(SEED)
    with torch.inference_mode(False):  # clones of inference tensors are ordinary ones here
        moment = recorder.moment.clone() / max(recorder.queries, 1)
        weight = None if recorder.weight is None else recorder.weight.clone()
        seam.fit_(recorder.keys.clone(), moment, weight=weight, generator=generator)
    recorder.measure_anew(seam.eval())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
