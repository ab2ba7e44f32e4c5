"""The most bytes of tensors that a call holds at once, on a CPU."""

import torch


def peak_bytes(call):
    """Bytes allocated beyond those before the call, at their largest.

    From the profiler's record of each allocation, so that the number does not depend
    on what else the process holds, nor on when the allocator returns memory.
    """
    call()  # what is made once is not counted
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held, largest = 0, 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        largest = max(largest, held)
    return largest
