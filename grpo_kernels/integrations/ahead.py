"""Numbers that the host asks a device for ahead of time, so that it need not wait for what it has queued since."""

import torch


class TokenCount:
    """How many tokens a mask counts. Made before the model runs, and read after: the model is not waited for.

    Args:
        mask: of any shape; tokens other than 0 count.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._count, self._copied = mask.count_nonzero(), None
        if mask.is_cuda:
            on_device, self._count = self._count, torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._count)
