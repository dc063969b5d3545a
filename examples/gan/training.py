"""One training run: its networks, optimizers, average and history; one step of it; saving and restoring all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gan.data import Images
from gan.networks import NETWORKS, gradient_norms, normalize, sigmas


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides its length and device; a checkpoint keeps it."""

    data: str = "digits"
    size: int = 16
    network: str = "projection"
    norm: str = "bssn"
    scale: float = sqrt(2)  # bssn_fast's own default
    width: int = 24
    noise_dim: int = 64
    batch: int = 64
    lr_generator: float = 1e-3
    lr_discriminator: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.9
    critic_steps: int = 1
    ema_decay: float = 0.995
    log_every: int = 25
    seed: int = 0


@dataclass
class History:
    """What the curves show, one entry per logged step; `sigma` and `gradient` by layer of the discriminator."""

    step: list[int] = field(default_factory=list)
    loss_discriminator: list[float] = field(default_factory=list)
    loss_generator: list[float] = field(default_factory=list)
    sigma: dict[str, list[float]] = field(default_factory=dict)
    gradient: dict[str, list[float]] = field(default_factory=dict)


class Run:
    """A GAN in training. Everything random comes from torch's global generators, seeded here."""

    def __init__(self, settings: Settings, images: Images, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        channels, n_classes = images.pixels.shape[1], len(images.classes)
        self.settings, self.images, self.device = settings, images.to(device), device
        generator, discriminator = NETWORKS[settings.network]
        self.generator = generator(channels, settings.size, n_classes, settings.noise_dim, settings.width).to(device)
        self.discriminator = discriminator(channels, settings.size, n_classes, settings.width).to(device)
        normalize(self.discriminator, settings.norm, settings.scale)
        self.average = AveragedModel(
            self.generator, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True
        )
        self.optimizer_generator = _adam(self.generator, settings.lr_generator, settings)
        self.optimizer_discriminator = _adam(self.discriminator, settings.lr_discriminator, settings)
        self.history = History()
        self.steps_done = 0

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.settings.noise_dim, device=self.device)

    def step(self) -> tuple[float, float]:
        """One step of the generator and `critic_steps` before it, with the hinge loss; returns the two last losses.

        That of the discriminator comes first.
        """
        for _ in range(self.settings.critic_steps):
            loss_discriminator = self._step_discriminator()
        if self.steps_done % self.settings.log_every == 0:
            self._log_layers()
        losses = loss_discriminator.item(), self._step_generator().item()
        if self.steps_done % self.settings.log_every == 0:
            self.history.step.append(self.steps_done)
            self.history.loss_discriminator.append(losses[0])
            self.history.loss_generator.append(losses[1])
        self.steps_done += 1
        return losses

    def _step_discriminator(self) -> Tensor:
        real, labels = self.images.batch(self.settings.batch)
        with torch.no_grad():
            fake = self.generator(self.noise(len(real)), labels)
        score_real = self.discriminator(real, labels)
        score_fake = self.discriminator(fake, labels)
        loss = relu(1 - score_real).mean() + relu(1 + score_fake).mean()
        self.optimizer_discriminator.zero_grad()
        loss.backward()
        self.optimizer_discriminator.step()
        return loss.detach()

    def _step_generator(self) -> Tensor:
        _, labels = self.images.batch(self.settings.batch)
        self.discriminator.requires_grad_(False)  # its weights then build no graph
        loss = -self.discriminator(self.generator(self.noise(len(labels)), labels), labels).mean()
        self.optimizer_generator.zero_grad()
        loss.backward()
        self.discriminator.requires_grad_(True)
        self.optimizer_generator.step()
        self._update_average()
        return loss.detach()

    def _update_average(self) -> None:
        self.average.update_parameters(self.generator)

    def _log_layers(self) -> None:
        for curves, values in (
            (self.history.sigma, sigmas(self.discriminator, self.settings.norm)),
            (self.history.gradient, gradient_norms(self.discriminator)),
        ):
            for name, value in values.items():
                curves.setdefault(name, []).append(value)

    @torch.no_grad()
    def sample(self, labels: Tensor, seed: int = 0) -> Tensor:
        """Return images [n, channels, size, size] of the averaged generator; torch's random state stays as it was."""
        self.average.eval()
        noise = torch.randn(len(labels), self.settings.noise_dim, generator=torch.Generator().manual_seed(seed))
        noise, labels = noise.to(self.device), labels.to(self.device)
        return torch.cat([self.average(z, y) for z, y in zip(noise.split(512), labels.split(512), strict=True)])

    def save(self, path: Path) -> None:
        """Write all that the run's next step depends on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"settings": asdict(self.settings), "history": asdict(self.history), "steps_done": self.steps_done}
        state["random_cpu"] = torch.get_rng_state()
        state["random_cuda"] = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        temporary = path.with_suffix(".tmp")  # an interrupted write leaves the last checkpoint whole
        torch.save(state, temporary)
        temporary.replace(path)

    def restore(self, state: dict) -> None:
        """Continue from `state`, as `load_checkpoint` returned it."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history = History(**state["history"])
        self.steps_done = state["steps_done"]
        torch.set_rng_state(state["random_cpu"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
            "optimizer_generator": self.optimizer_generator,
            "optimizer_discriminator": self.optimizer_discriminator,
        }


def load_checkpoint(path: Path) -> dict:
    """Return what `Run.save` wrote, with all tensors on the CPU; raises OSError, or ValueError for another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not {"settings", "history", "steps_done"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this program")
    return state


def _adam(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr, betas=(settings.beta1, settings.beta2))
