"""Run the evidence and write its report.

python -m experiments               # all of it on a CPU; what an interrupted run has finished is not repeated
python -m experiments --quick       # tiny trainings: shows that it works, and nothing else
python -m experiments --show        # only tables and pictures, from the results that are there
python -m experiments --gpu         # the paper's networks in full, eight minutes; after `make gpu`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gan import data

from benchmarks.work import layer_sets
from experiments import plan, switching
from experiments.files import write_whole
from experiments.measures import depth, inception, scores, spectra
from experiments.shown import report
from experiments.trainings import captured, pool

QUICK_SETS = ("bsn_cnn_d32", "sngan_d32")
GPU_SECONDS = 480.0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny trainings, two seeds, results beside the work")
    parser.add_argument("--gpu", action="store_true", help="the paper's networks in full, for --minutes")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and pictures of what has been found")
    parser.add_argument("--data", help="digits, mnist, emoji, photos, cifar10 or a folder; nothing else is used then")
    parser.add_argument("--network", choices=("paper", "residual"), help="of the discriminator (default: paper)")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, help="trainings of each setting")
    parser.add_argument("--minutes", type=float, default=GPU_SECONDS / 60, help="of --gpu (default: 8)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, one thread each (default: 2)")
    parser.add_argument("--device", help="default: cuda with --gpu, else cpu")
    parser.add_argument("--cifar10-root", default="data", help="folder of torchvision's CIFAR10 (default: data)")
    parser.add_argument(
        "--inception",
        type=Path,
        nargs="?",
        const=inception.default_weights(),
        metavar="WEIGHTS",
        help="real FID and inception score as well, by torch-fidelity (default weights: those in torch's cache)",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder of finished trainings")
    parser.add_argument("--results", type=Path, help="folder of the report (default: experiments/results)")
    return parser


def choose_profile(args: argparse.Namespace) -> plan.Profile:
    """Return the profile that the options name."""
    profile = plan.GPU if args.gpu else plan.QUICK if args.quick else plan.CPU
    changes: dict[str, Any] = {name: v for name in ("steps", "seeds") if (v := getattr(args, name)) is not None}
    base = {name: v for name in ("data", "network") if (v := getattr(args, name)) is not None}
    if base:
        changes |= {"base": replace(profile.base, **base), "others": {}}
    return replace(profile, **changes)


def choose_results(args: argparse.Namespace) -> Path:
    """Return the folder of the report: the repository's own only for the profiles as they are."""
    committed = Path(__file__).with_name("results")
    if args.results:
        return args.results
    if args.quick or args.data or args.network or args.steps or args.seeds:
        return args.work / "results"
    return committed / "gpu" if args.gpu else committed


def references(profile: plan.Profile, root: str) -> list[dict[str, Any]]:
    """Return by kind of images what other real ones score: the worst that a perfect generator should."""
    rows = []
    for name in (profile.base.data, *profile.others):
        images = data.load(name, profile.base.size, root).pixels
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        half = scores.Scorer(images[order[scores.GENERATED :]])
        rows.append({"data": name, **asdict(half.scores(images[order]))})
    return rows


def exact(args: argparse.Namespace, profile: plan.Profile) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all that needs no training, of which the folder of the work keeps what is done."""
    sets = layer_sets.load()
    chosen = {name: sets[name] for name in QUICK_SETS} if args.quick else sets
    (args.work / "layers").mkdir(parents=True, exist_ok=True)
    kinds = "-".join(Path(name).name for name in (profile.base.data, *profile.others))

    def kept(name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        file = args.work / f"{name}.json"
        if not file.exists():
            write_whole(file, json.dumps(make()))
        return json.loads(file.read_text())

    torch.set_num_threads(1)  # the seconds of switching are those of one thread
    return {
        "initial": kept(
            f"initial-{profile.seeds}-{profile.base.width}", lambda: depth.rows(profile.seeds, profile.base.width)
        ),
        "references": kept(f"references-{kinds}", lambda: references(profile, args.cifar10_root)),
        "switching": kept("switching", lambda: switching.both(args.quick)),
        "slopes": kept(f"slopes-{profile.seeds}", lambda: spectra.slopes(profile.seeds)),
        "layers": spectra.layer_rows(chosen, args.work / "layers"),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program with the command line `argv`; returns the folder of the report."""
    parser = make_parser()
    args = parser.parse_args(argv)
    profile, results = choose_profile(args), choose_results(args)
    if args.show:
        report.show(results, profile)
        return results
    try:
        for name in (profile.base.data, *profile.others):  # before anything is computed
            data.load(name, profile.base.size, args.cifar10_root)
    except data.DataError as error:
        parser.error(str(error))
    if args.inception and (reason := inception.why_unavailable(args.inception)):
        parser.error(f"--inception: {reason}")
    trials, folder = profile.trials(), args.work / "trainings"
    if args.gpu:
        if missing := captured.run_for(trials, folder, 60 * args.minutes, args.cifar10_root, args.device or "cuda"):
            print(f"{missing} of {len(trials)} trainings are left: the same command goes on with them")
        found: dict[str, list[dict[str, Any]]] = {
            "initial": [],
            "references": [],
            "switching": [],
            "slopes": [],
            "layers": [],
        }
    else:
        found = exact(args, profile)
        pool.run_all(trials, folder, args.workers, args.cifar10_root, args.device or "cpu", args.inception)
    report.write(results, profile, pool.read_all(trials, folder), found)
    print(f"report: {results / 'tables.md'}")
    return results


if __name__ == "__main__":
    main()
