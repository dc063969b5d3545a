"""The real FID and inception score, through torch-fidelity, where its Inception weights are present already."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's name of its file."""


class InceptionUnavailableError(Exception):
    """The real FID cannot be computed here; the message says why and what to do."""


def why_unavailable(weights: Path | None = None) -> str | None:
    """Return why the real FID cannot be computed, or None if it can.

    weights: the file of weights; by default the one in torch's cache. Nothing is ever downloaded.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed: pip install torch-fidelity"
    file = weights or default_weights()
    if not file.is_file():
        return (
            f"no Inception weights at {file}: put {WEIGHTS}, of torch-fidelity's releases, there, "
            "or name its place: --inception WEIGHTS"
        )
    return None


def default_weights() -> Path:
    """Return where torch-fidelity keeps its weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


class _Bytes(torch.utils.data.Dataset[Tensor]):
    """Images [n, 1 or 3, h, w] in [-1, 1] as torch-fidelity wants them: [3, h, w], uint8."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels.detach().cpu().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.pixels[i].expand(3, -1, -1)


def fid_and_score(real: Tensor, generated: Tensor, weights: Path | None = None) -> tuple[float, float]:
    """Return (FID, inception score) of images [n, 1 or 3, h, w] in [-1, 1]; raises InceptionUnavailableError."""
    reason = why_unavailable(weights)
    if reason is not None:
        raise InceptionUnavailableError(reason)
    import torch_fidelity

    metrics = torch_fidelity.calculate_metrics(
        input1=_Bytes(generated),
        input2=_Bytes(real),
        fid=True,
        isc=True,
        cuda=torch.cuda.is_available(),
        feature_extractor_weights_path=str(weights or default_weights()),
        verbose=False,
    )
    return metrics["frechet_inception_distance"], metrics["inception_score_mean"]
