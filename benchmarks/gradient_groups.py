"""What `gradient_groups` costs in one process, and what it gains under DistributedDataParallel.

    python -m benchmarks.gradient_groups

First table: forward and backward of the normalisation alone, all threads. Second: a discriminator's training steps, two
forwards and one backward, in two processes of one thread each that exchange gradients through gloo on this machine; and
the same over an imitated network: every bucket of gradients waits for its turn and takes a second for NETWORK bytes.
Median milliseconds of rounds in which all candidates take turns.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.parallel import DistributedDataParallel

import bssn_fast
from benchmarks.timing import machine
from benchmarks.work import layer_sets
from benchmarks.work.networks import DISCRIMINATORS

GROUPS = (1, 2, 4, 8)
SETS = ("sngan_d32", "bsn_cnn_d32", "bsn_resnet_d128", "biggan_d128")
ROUNDS, STEPS = 15, 10
BATCH, WIDTH, BUCKET_MB = 8, 64, 4
NETWORK = 125e6  # 1 Gbit/s


def _medians(candidates: list[Callable[[], None]], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds + 2):
        for run, seconds in zip(candidates, times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seconds[2:]) for seconds in times]  # the first two rounds make plans and buffers


def normalisation(name: str) -> list[float]:
    """Forward and backward of one layer set, for each number of groups."""
    weights = layer_sets.Weights(layer_sets.load()[name])
    grads = [torch.randn_like(w) for w in weights()]

    def candidate(gradient_groups: int) -> Callable[[], None]:
        model = bssn_fast.apply(copy.deepcopy(weights), gradient_groups=gradient_groups)

        def run() -> None:
            model.zero_grad()
            torch.autograd.backward(model(), grads)

        return run

    return _medians([candidate(n) for n in GROUPS], ROUNDS)


def _send_slowly(wire: ThreadPoolExecutor, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    sent: torch.futures.Future[Tensor] = torch.futures.Future()
    buffer = bucket.buffer()

    def send() -> None:
        dist.all_reduce(buffer)
        time.sleep(buffer.nbytes / NETWORK)
        sent.set_result(buffer / dist.get_world_size())

    wire.submit(send)
    return sent


def _train(rank: int, store: str, name: str, network: bool, found: mp.SimpleQueue) -> None:
    machine.pin_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = DISCRIMINATORS[name](WIDTH)
    real, fake = torch.randn(2, BATCH, 3, 32, 32)

    def candidate(model: nn.Module) -> Callable[[], None]:
        model = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)
        if network:
            model.register_comm_hook(ThreadPoolExecutor(1), _send_slowly)

        def run() -> None:
            model.zero_grad()
            (relu(1 - model(real)).mean() + relu(1 + model(fake)).mean()).backward()

        return run

    models = [bssn_fast.apply(copy.deepcopy(plain), gradient_groups=n) for n in GROUPS]
    medians = _medians([candidate(m) for m in [plain, *models]], STEPS)
    if rank == 0:
        found.put(medians)
    dist.destroy_process_group()


def training(name: str, network: bool) -> list[float]:
    """Steps of a discriminator in two processes: without normalisation, and for each number of groups."""
    with tempfile.TemporaryDirectory() as folder:
        found = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_train, (str(Path(folder) / "store"), name, network, found), nprocs=2)
        return found.get()


def main() -> None:
    about = machine.describe()
    print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}")
    header = " | ".join(f"{n} groups" if n > 1 else "1 group" for n in GROUPS)
    print(f"\n| normalisation alone, ms | {header} |\n|---|{'---|' * len(GROUPS)}")
    for name in SETS:
        print(f"| `{name}` | {' | '.join(f'{t:.2f}' for t in normalisation(name))} |", flush=True)
    print(f"\n| training step, ms | not normalised | {header} |\n|---|---|{'---|' * len(GROUPS)}")
    for name in DISCRIMINATORS:
        for network in (False, True):
            about = f"{name}, {NETWORK * 8e-9:g} Gbit/s" if network else name
            print(f"| {about} | {' | '.join(f'{t:.0f}' for t in training(name, network))} |", flush=True)


if __name__ == "__main__":
    main()
