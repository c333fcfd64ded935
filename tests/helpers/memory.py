"""What tensors on a CPU hold at most."""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call):
    """The most that tensors held at a time, above what they held before; results included."""
    call()  # what is kept for good is there now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return held.max().item()
