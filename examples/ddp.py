"""The digits GAN in several processes, with DistributedDataParallel; on GPUs where there are any, else on the CPU.

torchrun --nproc-per-node 2 examples/ddp.py --steps 200
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # see the end of `main`
from gan import data
from gan.networks import Discriminator, Generator
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.parallel import DistributedDataParallel

import bssn_fast

SIZE, NOISE, WIDTH = 16, 64, 24


def train(steps: int, batch: int, device: torch.device) -> None:
    """Train the GAN on this process's GPU, or on the CPU, and see that all processes end with the same u and v."""
    images = data.load("digits", SIZE, "").to(device)
    n_classes = len(images.classes)

    # Normalise first, wrap then: DDP makes the first vectors equal on all ranks. With more than one group, the
    # gradients of the last layers are sent while the backward pass is at work on the first ones.
    discriminator: nn.Module = Discriminator(1, SIZE, n_classes, WIDTH).to(device)
    bssn_fast.apply(discriminator, "bssn", gradient_groups=2)
    discriminator = DistributedDataParallel(discriminator)
    generator = DistributedDataParallel(Generator(1, SIZE, n_classes, NOISE, WIDTH).to(device))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    torch.manual_seed(dist.get_rank())  # other images and noise in each process

    def noise(n: int) -> Tensor:
        return torch.randn(n, NOISE, device=device)

    for step in range(steps):
        real, labels = images.batch(batch)
        with torch.no_grad():
            fake = generator(noise(len(real)), labels)
        loss_d = relu(1 - discriminator(real, labels)).mean() + relu(1 + discriminator(fake, labels)).mean()
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        # Past DDP, as there are no gradients of the discriminator to send.
        frozen = discriminator.module.requires_grad_(False)
        loss_g = -frozen(generator(noise(len(labels)), labels), labels).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        frozen.requires_grad_(True)
        if dist.get_rank() == 0 and (step % 50 == 0 or step == steps - 1):
            print(f"step {step}: discriminator {loss_d.item():.3f}, generator {loss_g.item():.3f}", flush=True)

    vectors = torch.cat([buffer.flatten() for buffer in discriminator.buffers()])
    first = vectors.clone()
    dist.broadcast(first, 0)
    assert torch.equal(vectors, first), "ranks differ in their vectors"
    if dist.get_rank() == 0:
        print(f"u and v are the same bits in all {dist.get_world_size()} processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="images in each process")
    options = parser.parse_args()

    use_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    train(options.steps, options.batch, device)
    # The process group's threads have to end before Python does: one that still held a tensor then would abort the
    # process. They end with the last reference to the group. DDP models have some: they are gone, as `train` has
    # returned. torch.distributed.nn keeps some for good if it is first imported, by DDP, when there is a group.
    gc.collect()
    dist.barrier()  # nobody leaves while another still waits for its messages
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
