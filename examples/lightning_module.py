"""The digits GAN as a LightningModule. Needs `pip install lightning`.

python examples/lightning_module.py --steps 200
"""

from __future__ import annotations

import argparse

import lightning
import torch
from gan import data
from gan.networks import Discriminator, Generator
from torch import Tensor
from torch.nn.functional import relu
from torch.utils.data import DataLoader, TensorDataset

import bssn_fast

SIZE, NOISE, WIDTH = 16, 64, 24


class GAN(lightning.LightningModule):
    """A hinge GAN. Lightning needs nothing special: checkpoints hold u and v, and strategies wrap the whole module."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimizers
        self.generator = Generator(1, SIZE, n_classes, NOISE, WIDTH)
        self.discriminator = Discriminator(1, SIZE, n_classes, WIDTH)
        # To the discriminator, whose forward is called, not to `self`, whose forward never is.
        bssn_fast.apply(self.discriminator, "bssn")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(m.parameters(), 1e-3, (0.5, 0.999)) for m in (self.generator, self.discriminator)]

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, NOISE, device=self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, labels = batch
        optimizer_g, optimizer_d = self.optimizers()

        self.toggle_optimizer(optimizer_d)
        fake = self.generator(self.noise(len(real)), labels).detach()
        loss_d = relu(1 - self.discriminator(real, labels)).mean() + relu(1 + self.discriminator(fake, labels)).mean()
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)

        self.toggle_optimizer(optimizer_g)  # freezes the discriminator, whose weights then build no graph
        loss_g = -self.discriminator(self.generator(self.noise(len(real)), labels), labels).mean()
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)
        largest = torch.stack(list(bssn_fast.sigma(self.discriminator).values())).max()
        self.log_dict({"loss_d": loss_d, "loss_g": loss_g, "largest_sigma": largest}, prog_bar=True)


def main(arguments: list[str] | None = None) -> lightning.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/lightning", help="folder for the checkpoint")
    options = parser.parse_args(arguments)
    digits = data.load("digits", SIZE, "")
    loader = DataLoader(TensorDataset(digits.pixels, digits.labels), batch_size=64, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_steps=2 * options.steps,  # Lightning counts the steps of both optimizers
        accelerator="auto",
        logger=False,
        enable_model_summary=False,
        default_root_dir=options.out,
    )
    trainer.fit(GAN(len(digits.classes)), loader)
    return trainer


if __name__ == "__main__":
    main()
