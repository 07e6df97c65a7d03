"""Data-parallel collectives of the codebook: always the same shapes on every rank, so that none can hang."""

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """A process group that survives copy and pickle: copies share it, a pickle leaves it behind (default group)."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> "Group":
        return Group(self.group)

    def __reduce__(self) -> tuple:
        return (Group, ())

    @property
    def active(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if self.active else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.active else 0

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor summed over the ranks, in one all-reduce of one flat buffer."""
        if not self.active:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
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
