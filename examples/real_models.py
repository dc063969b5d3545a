"""Normalise well-known networks and train each for one step.

python examples/real_models.py
python examples/real_models.py --only unet2d vit

Small versions with random weights of models of diffusers and transformers: nothing is downloaded. Needs
`pip install diffusers transformers`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

import bssn_fast

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1])
TOKENS = torch.arange(32).view(2, 16) % 29
STEPS = torch.tensor([3, 500])  # of the noise, for diffusion
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}

Loss = Callable[[Any], Tensor]
Entry = tuple[nn.Module, Loss]


def unet2d() -> Entry:
    """The network of unconditional diffusion models."""
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, lambda m: (m(IMAGES, STEPS).sample - IMAGES).square().mean()


def unet2d_condition() -> Entry:
    """The network of Stable Diffusion."""
    model = diffusers.UNet2DConditionModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = torch.zeros(2, 4, 32)
    return model, lambda m: (m(IMAGES, STEPS, encoder_hidden_states=text).sample - IMAGES).square().mean()


def autoencoder() -> Entry:
    """The autoencoder of Stable Diffusion."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return model, lambda m: (m(IMAGES).sample - IMAGES).square().mean()


def vit() -> Entry:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    return transformers.ViTForImageClassification(config), lambda m: m(IMAGES, labels=CLASSES).loss


def resnet() -> Entry:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config), lambda m: m(IMAGES, labels=CLASSES).loss


def convnext() -> Entry:
    """Depthwise convolutions of 7 x 7."""
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64])
    return transformers.ConvNextForImageClassification(config), lambda m: m(IMAGES, labels=CLASSES).loss


def bert() -> Entry:
    """Its output layer shares the embedding's weight."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=100, **SMALL))
    return model, lambda m: m(TOKENS, labels=TOKENS).loss


def llama() -> Entry:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, num_key_value_heads=1, **SMALL))
    return model, lambda m: m(TOKENS, labels=TOKENS).loss


def wav2vec2() -> Entry:
    """One of its convolutions carries weight_norm, and is left out."""
    config = transformers.Wav2Vec2Config(
        conv_dim=(16, 16, 16),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        **SMALL,
    )
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    return transformers.Wav2Vec2Model(config), lambda m: m(sound).last_hidden_state.square().mean()


MODELS: dict[str, Callable[[], Entry]] = {
    f.__name__: f for f in (unet2d, unet2d_condition, autoencoder, vit, resnet, convnext, bert, llama, wav2vec2)
}


def train_one_step(name: str) -> str:
    """Build, normalise and train a model; return a line about it."""
    torch.manual_seed(0)
    model, loss_of = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # stays valid
    bssn_fast.apply(model, "bssn", filter_fn=lambda name, layer: not nn.utils.parametrize.is_parametrized(layer))
    model.train()
    start = time.perf_counter()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert loss.isfinite(), f"{name}: the loss is {loss}"
    assert not without, f"{name}: no gradients of {without}"
    sigmas = torch.stack(list(bssn_fast.sigma(model).values()))
    return (
        f"{name:18}{sum(p.numel() for p in model.parameters()):>9,} parameters  {len(sigmas):>3} layers normalised  "
        f"sigma {sigmas.min():.2f} to {sigmas.max():.2f}  loss {loss.item():.3f}  {seconds:.2f} s"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help="some models")
    transformers.logging.set_verbosity_error()
    for name in parser.parse_args(arguments).only:
        print(train_one_step(name), flush=True)


if __name__ == "__main__":
    main()
