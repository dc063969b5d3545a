"""What the profiler looks at: one forward and one backward of a layer set by the CUDA kernels.

ncu --profile-from-start off python -m benchmarks.gpu.profiled SET
"""

from __future__ import annotations

import sys

import torch

from benchmarks.against import peers
from benchmarks.work import layer_sets
from benchmarks.work.problem import Problem


def main(name: str, device: str = "cuda") -> None:
    """Run once for what happens once, and then what the profiler sees; the backends' names are those of devices."""
    problem = Problem(layer_sets.load()[name], "bssn", device)
    peer = peers.make(f"{peers.OURS} {device}", problem)
    peer.first_run()
    peer.release()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    peer.forward()
    peer.backward()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
