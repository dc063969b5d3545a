"""Train a small convolutional GAN on real images, its discriminator normalised by bssn_fast.

python examples/train_gan.py                                  # handwritten digits, bssn
python examples/train_gan.py --norm torch-sn --seed 1
python examples/train_gan.py --resume runs/digits-bssn/checkpoint.pt --steps 5000

Ctrl-C ends the training after the step under way and saves it. Needs pip install 'bssn_fast[examples]'.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from gan import data, metrics, report
from gan.networks import NETWORKS, NORMS, SCALED_NORMS, levels
from gan.training import Run, Settings, load_checkpoint
from tqdm import tqdm


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; the options of `Settings` have no value unless they are given."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )

    def setting(name: str, text: str, **options: Any) -> None:
        value = getattr(default, name)
        text = f"{text} (default: {value:.4g})" if isinstance(value, float) else f"{text} (default: {value})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=text, **options)

    setting("data", f"{', '.join(data.SHIPPED)}, cifar10, or a folder of images whose subfolders are the classes")
    setting("size", "images are resized to size x size: 8, 16, 32, ...")
    setting("network", "class-conditional by projection, or the BSSN paper's CNN, unconditional", choices=NETWORKS)
    setting("norm", "normalisation of the discriminator", choices=NORMS)
    setting("scale", f"c of {' and '.join(SCALED_NORMS)}")
    setting("width", "channels at full resolution")
    setting("batch", "images per batch")
    setting("lr_generator", "learning rate")
    setting("lr_discriminator", "learning rate")
    setting("beta1", "of both Adam optimizers")
    setting("beta2", "of both Adam optimizers")
    setting("critic_steps", "steps of the discriminator for one of the generator")
    setting("seed", "of everything random")
    parser.add_argument("--steps", type=int, default=1500, help="in total, also when resuming (default: 1500)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the results (default: a new one, runs/DATA-NORM...; with --resume the checkpoint's)",
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--cifar10-root", default="data", help="folder of torchvision's CIFAR10 (default: data)")
    parser.add_argument(
        "--resume",
        type=Path,
        default=None,
        help="checkpoint to continue bit by bit, with the settings it was made with",
    )
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message if an option's value makes no sense."""
    for name in ("steps", "save_every", "batch", "width", "critic_steps"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("scale", "lr_generator", "lr_discriminator"):
        if not 0 < getattr(args, name, 1) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args, name, 0) < 1:
            parser.error(f"--{name} must be at least 0 and less than 1, not {getattr(args, name)}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")


def choose_folder(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: Settings) -> Path:
    """Return the folder for the results, in which no other run has left its own."""
    if args.resume:
        return args.out or args.resume.parent
    if args.out:
        if (args.out / "checkpoint.pt").exists():
            parser.error(f"{args.out} has a run's checkpoint: --resume it, or choose another folder with --out")
        return args.out
    name = f"{Path(settings.data).name}-{settings.norm}"
    folders = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in count(1))
    return next(folder for folder in folders if not folder.exists())


def choose_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, saved: dict | None) -> Settings:
    """Return the settings given by the options or, when resuming, by the checkpoint; contradictions end the program."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if saved is None:
        settings = replace(Settings(), **given)
        if "scale" in given and settings.norm not in SCALED_NORMS:
            parser.error(f"--scale belongs to --norm {' and '.join(SCALED_NORMS)}; --norm {settings.norm} has none")
        return settings
    settings = Settings(**saved)
    changed = [name for name, value in given.items() if value != getattr(settings, name)]
    if changed:
        parser.error(f"--resume continues with the checkpoint's own settings; it differs in {', '.join(changed)}")
    return settings


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program with the command line `argv`; returns the folder of the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    try:
        saved = load_checkpoint(args.resume) if args.resume else None
        settings = choose_settings(parser, args, saved["settings"] if saved else None)
        levels(settings.size)
        images = data.load(settings.data, settings.size, args.cifar10_root)
    except (data.DataError, OSError, ValueError) as error:
        parser.error(str(error))
    run = Run(settings, images, torch.device(args.device))
    if saved:
        run.restore(saved)
    if run.steps_done >= args.steps:
        parser.error(f"--steps {args.steps}: the checkpoint has {run.steps_done} steps already")
    out = choose_folder(parser, args, settings)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train(run, args.steps, args.save_every, out / "checkpoint.pt")
    if run.steps_done < args.steps:
        print(f"Interrupted after {run.steps_done} steps. Go on with: --resume {out / 'checkpoint.pt'}")
        raise SystemExit(128 + signal.SIGINT)
    finish(run, time.perf_counter() - started, out)
    return out


@contextmanager
def interruption() -> Iterator[list[bool]]:
    """Gives a list that has an element once Ctrl-C was pressed; a second Ctrl-C ends the program at once."""
    asked: list[bool] = []

    def note(*_: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def train(run: Run, steps: int, save_every: int, checkpoint: Path) -> None:
    """Train until `steps` are done or Ctrl-C is pressed, writing the checkpoint now and then and at the end."""
    progress = tqdm(
        total=steps, initial=run.steps_done, desc=report.describe(run.settings), unit="step", mininterval=0.5
    )
    with progress, interruption() as interrupted:
        while run.steps_done < steps and not interrupted:
            loss_discriminator, loss_generator = run.step()
            progress.update()
            progress.set_postfix(D=f"{loss_discriminator:.2f}", G=f"{loss_generator:.2f}", refresh=False)
            if run.steps_done % save_every == 0:
                run.save(checkpoint)
        run.save(checkpoint)


def finish(run: Run, seconds: float, out: Path) -> None:
    """Write the sample grid and the curves, measure the quality and print the summary."""
    classes = run.images.classes
    title = f"{run.settings.data}, {report.describe(run.settings)}"
    report.save_grid(run.sample(report.grid_labels(len(classes))), out / "samples.png")
    report.save_curves(run.history, title, out / "curves.png")
    judged = len(classes) > 1 and int(run.images.labels.bincount().min()) > 1  # by a classifier of the real images
    quality = metrics.evaluate(run.images, run.sample(run.images.labels, seed=1)) if judged else None
    files = [out / name for name in ("samples.png", "curves.png", "checkpoint.pt")]
    report.print_summary(run.settings, run.steps_done, seconds, quality, files)


if __name__ == "__main__":
    main()
