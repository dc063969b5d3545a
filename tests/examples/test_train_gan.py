"""The GAN example: its data, its metric, bit-exact resuming, and each normalisation through the whole program."""

from __future__ import annotations

import builtins
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_gan
from gan import data, metrics, networks, report
from gan.training import Run, Settings, load_checkpoint
from PIL import Image
from torch.nn.utils import parametrize

CPU = torch.device("cpu")
SMALL = Settings(size=8, width=4, batch=8, log_every=1)
SMALL_OPTIONS = ["--size", "8", "--width", "4", "--batch", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load("digits", 8, "")


def trained(settings: Settings, images: data.Images, steps: int) -> Run:
    run = Run(settings, images, CPU)
    for _ in range(steps):
        run.step()
    return run


def assert_same(a: object, b: object) -> None:
    """Compare two checkpoints bit by bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_digits_are_all_there_and_span_the_range(digits: data.Images) -> None:
    assert digits.pixels.shape == (1797, 1, 8, 8)
    assert digits.pixels.aminmax() == (-1, 1)
    assert digits.labels.bincount().min() > 170


def test_larger_digits_keep_the_mean_brightness(digits: data.Images) -> None:
    large = data.load("digits", 16, "")
    assert large.pixels.shape == (1797, 1, 16, 16)
    assert torch.allclose(large.pixels.mean((1, 2, 3)), digits.pixels.mean((1, 2, 3)), atol=0.05)


def test_folder_reads_classes_and_cuts_the_middle_square(tmp_path: Path) -> None:
    for name, level in (("dark", 0), ("light", 255)):
        (tmp_path / name).mkdir()
        image = Image.new("RGB", (24, 8), (128, 128, 128))
        image.paste((level, level, level), (8, 0, 16, 8))
        image.save(tmp_path / name / "a.png")
    images = data.load(str(tmp_path), 8, "")
    assert images.classes == ("dark", "light")
    assert images.labels.tolist() == [0, 1]
    assert torch.equal(images.pixels, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8))


def test_data_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataError, match="no images there"):
        data.load(str(tmp_path), 8, "")
    with pytest.raises(data.DataError, match="nor an existing folder"):
        data.load(str(tmp_path / "absent"), 8, "")
    real_import = builtins.__import__

    def without_torchvision(name: str, *args: object) -> object:
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_torchvision)
    with pytest.raises(data.DataError, match="pip install torchvision"):
        data.load("cifar10", 8, str(tmp_path))


@pytest.mark.parametrize("size", [4, 12, 24])
def test_size_must_be_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="image size"):
        networks.levels(size)


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64, generator=generator)
    root = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(root, (x - x.mean(0)).T, upper=False).T  # mean 0, covariance exactly 1
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 2.0, 0.5]).double()
    expected = 2.0**2 + (a - b).square().sum().item()  # commuting covariances a^2 and b^2, means 2 apart
    shift = torch.tensor([2.0, 0.0, 0.0]).double()
    assert metrics.frechet_distance(white * a, white * b + shift) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


def test_evaluation_prefers_real_images_and_leaves_the_random_state(digits: data.Images) -> None:
    some = data.Images(digits.pixels[:400], digits.labels[:400], digits.classes)
    before = torch.get_rng_state()
    noise = torch.rand(some.pixels.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    good, bad = metrics.evaluate(some, some.pixels), metrics.evaluate(some, noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert good.frechet == pytest.approx(0, abs=1e-6)
    assert bad.frechet > 10 * good.frechet_of_real_halves
    assert good.label_agreement > 0.9 > 0.3 > bad.label_agreement


@pytest.mark.parametrize("norm", networks.NORMS)
def test_two_steps_with_each_norm(norm: str, digits: data.Images) -> None:
    run = trained(replace(SMALL, norm=norm), digits, 2)
    layers = networks.weight_layers(run.discriminator)
    assert len(layers) == 5
    assert all(parametrize.is_parametrized(layer, "weight") == (norm != "none") for layer in layers.values())
    for curves in (run.history.sigma, run.history.gradient):
        assert curves.keys() == layers.keys()
        values = torch.tensor(list(curves.values()))
        assert values.shape == (5, 2)
        assert (values > 0).all()
        assert values.isfinite().all()


def test_scale_multiplies_the_weights(digits: data.Images) -> None:
    weights = []
    for scale in (1.0, 1.5):
        run = Run(replace(SMALL, scale=scale), digits, CPU)
        run.discriminator.eval()
        weights.append(run.discriminator.head.weight.detach())
    torch.testing.assert_close(weights[1], 1.5 * weights[0])


def test_resuming_is_bit_exact(digits: data.Images, tmp_path: Path) -> None:
    trained(SMALL, digits, 6).save(tmp_path / "whole.pt")
    trained(SMALL, digits, 3).save(tmp_path / "half.pt")
    torch.manual_seed(99)
    resumed = Run(SMALL, digits, CPU)
    resumed.restore(load_checkpoint(tmp_path / "half.pt"))
    assert resumed.steps_done == 3
    for _ in range(3):
        resumed.step()
    resumed.save(tmp_path / "resumed.pt")
    assert_same(load_checkpoint(tmp_path / "resumed.pt"), load_checkpoint(tmp_path / "whole.pt"))


def test_program_writes_its_files_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert train_gan.main([*SMALL_OPTIONS, *out, "--steps", "2", "--seed", "3"]) == tmp_path
    printed = capsys.readouterr().out
    assert "Frechet distance" in printed
    assert "not with any published FID" in " ".join(printed.split())
    with Image.open(tmp_path / "samples.png") as samples, Image.open(tmp_path / "curves.png") as curves:
        assert samples.size == (10 * 10 * 4, 8 * 10 * 4)
        assert curves.width > 1000
    checkpoint = str(tmp_path / "checkpoint.pt")
    train_gan.main(["--resume", checkpoint, "--steps", "3", "--device", "cpu", *out])
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["steps_done"], state["settings"]["seed"], state["settings"]["width"]) == (3, 3, 4)


def test_program_trains_on_colour_images_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        Image.effect_noise((12, 10), 10.0 * i).save(photos / f"{i}.png")
    train_gan.main([*SMALL_OPTIONS, "--data", str(photos), "--steps", "1", "--out", str(tmp_path)])
    assert "No Frechet distance" in capsys.readouterr().out
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm", "sn", "--scale", "1.2"], "--norm sn has none"),
        (["--data", "nowhere"], "nor an existing folder"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--resume", __file__], "is no checkpoint"),
        (["--size", "12"], "image size"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--width", "0"], "--width must be at least 1"),
        (["--critic-steps", "0"], "--critic-steps must be at least 1"),
        (["--save-every", "0"], "--save-every must be at least 1"),
        (["--scale", "-1"], "--scale must be positive"),
        (["--lr-generator", "nan"], "--lr-generator must be positive"),
        (["--beta2", "1"], "--beta2 must be at least 0 and less than 1"),
        (["--steps", "-5"], "--steps must be at least 1"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "gpu"], "--device gpu: "),
    ],
)
def test_wrong_options_end_with_a_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_gan.main(["--steps", "1", "--out", str(tmp_path), *options])
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_tensors_of_something_else_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(SystemExit):
        train_gan.main(["--resume", str(tmp_path / "other.pt")])
    assert "no checkpoint of this program" in capsys.readouterr().err


def test_runs_do_not_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "finish", lambda *_: None)
    first, second = (train_gan.main([*SMALL_OPTIONS, "--steps", "1"]) for _ in range(2))
    assert (first, second) == (Path("runs/digits-bssn"), Path("runs/digits-bssn-2"))
    resumed = train_gan.main(["--resume", str(first / "checkpoint.pt"), "--steps", "2", "--device", "cpu"])
    assert resumed == first
    with pytest.raises(SystemExit):
        train_gan.main([*SMALL_OPTIONS, "--steps", "1", "--out", str(second)])
    assert "choose another folder" in capsys.readouterr().err
    assert load_checkpoint(second / "checkpoint.pt")["steps_done"] == 1
    with pytest.raises(SystemExit):
        train_gan.main(["--resume", str(first / "checkpoint.pt"), "--steps", "2", "--device", "cpu"])
    assert "has 2 steps already" in capsys.readouterr().err


def test_an_interrupted_run_is_saved_after_a_whole_step(
    digits: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Run._step_generator

    def interrupted(run: Run) -> float:
        if run.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    monkeypatch.setattr(Run, "_step_generator", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        train_gan.main([*SMALL_OPTIONS, "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"after 3 steps. Go on with: --resume {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().out
    monkeypatch.undo()
    trained(replace(SMALL, log_every=25), digits, 3).save(tmp_path / "whole.pt")
    assert_same(load_checkpoint(tmp_path / "checkpoint.pt"), load_checkpoint(tmp_path / "whole.pt"))


def test_resuming_with_other_settings_is_refused(
    digits: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(SMALL, digits, CPU).save(tmp_path / "c.pt")
    with pytest.raises(SystemExit):
        train_gan.main(["--resume", str(tmp_path / "c.pt"), "--batch", "16", "--size", "8", "--out", str(tmp_path)])
    assert "differs in batch" in capsys.readouterr().err


def test_grid_places_images_row_by_row(tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    report.save_grid(pixels, tmp_path / "grid.png", columns=2, pixel_size=1)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (20, 20)
        assert [image.getpixel(at)[0] for at in ((5, 5), (15, 5), (5, 15), (15, 15))] == pytest.approx(
            [0, 85, 170, 255], abs=1
        )


def test_grid_labels_give_each_column_a_class() -> None:
    assert report.grid_labels(10, rows=2).tolist() == [*range(10), *range(10)]
    assert report.grid_labels(3, rows=1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert report.grid_labels(15, rows=2).tolist() == [*range(15), *range(5)]
