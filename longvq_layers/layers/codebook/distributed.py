"""Data-parallel collectives of the codebook. Every rank calls them with the same shapes, so that none can hang."""

import torch
import torch.distributed as dist
from torch import Tensor

from longvq_layers.layers.codebook.operations import pick


class Group:
    """A process group that can be copied and pickled. A copy shares it; a pickle loads with the default group."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> "Group":
        return Group(self.group)

    def __reduce__(self) -> tuple[type["Group"], tuple[()]]:
        return (Group, ())

    @property
    def active(self) -> bool:
        """Whether there are several ranks."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group) if self.active else 1

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group) if self.active else 0

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor summed over the ranks, by one all-reduce of one flat buffer."""
        if not self.active:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, all of one shape, joined along `dim`."""
        if not self.active:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank."""
        if not self.active:
            return tensor
        tensor = tensor.contiguous()
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(tensor, src=source, group=self.group)
        return tensor

    def sample(self, keys: Tensor, valid: Tensor, amount: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """About `amount` keys per head from all ranks: keys (H, N, D), valid (H, N).

        Every rank gives a sample of one shape, valid keys first. Entries without a key are not valid.
        """
        per_rank = -(-amount // self.size)
        if not self.active and keys.shape[1] <= per_rank:
            return keys, valid
        order = torch.rand(valid.shape, device=valid.device, generator=generator)
        order = torch.where(valid, order, -1.0)
        missing = max(0, per_rank - keys.shape[1])
        order = torch.nn.functional.pad(order, (0, missing), value=-1.0)
        score, index = order.topk(per_rank, dim=-1)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, missing))
        return self.gather(pick(keys, index), 1), self.gather((score >= 0).to(keys.dtype), 1) > 0
