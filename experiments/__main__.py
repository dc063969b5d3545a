"""Run the evidence and write its report.

python -m experiments               # all of it on a CPU; what an interrupted run has finished is not repeated
python -m experiments --quick       # tiny trainings: shows that it works, and nothing else
python -m experiments --gpu --data cifar10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gan import data

from benchmarks.work import layer_sets
from experiments import inception, plan, report, spectra
from experiments.trials import run_all

QUICK_SETS = ("bsn_cnn_d32", "sngan_d32")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny trainings, two seeds, results beside the work")
    parser.add_argument("--gpu", action="store_true", help="the paper's networks in full, on CIFAR10")
    parser.add_argument("--data", nargs="+", help="digits, photos, cifar10 or folders; the first gets all experiments")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, help="trainings of each setting")
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
    if args.data:
        changes["data"] = tuple(args.data)
    return replace(profile, **changes)


def exact(work: Path, sets: dict[str, layer_sets.LayerSet], seeds: int) -> tuple[list[Any], list[Any]]:
    """Return the rows of layers and of slopes, of which `work` keeps what is done."""
    (work / "layers").mkdir(parents=True, exist_ok=True)
    layers = spectra.layer_rows(sets, work / "layers")
    file = work / f"slopes-{seeds}.json"
    if not file.exists():
        spectra.write_whole(file, json.dumps(spectra.slopes(seeds)))
    return layers, json.loads(file.read_text())


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program with the command line `argv`; returns the folder of the report."""
    parser = make_parser()
    args = parser.parse_args(argv)
    profile = choose_profile(args)
    committed = Path(__file__).with_name("results")
    plain = not (args.quick or args.gpu or args.data or args.steps or args.seeds)
    results = args.results or (committed if plain else args.work / "results")
    try:
        for name in profile.data:  # before anything is computed
            data.load(name, profile.base.size, args.cifar10_root)
    except data.DataError as error:
        parser.error(str(error))
    if args.inception and (reason := inception.why_unavailable(args.inception)):
        parser.error(f"--inception: {reason}")
    sets = layer_sets.load()
    layers, slopes = exact(args.work, {n: sets[n] for n in QUICK_SETS} if args.quick else sets, profile.seeds)
    device = args.device or ("cuda" if args.gpu else "cpu")
    records = run_all(
        profile.trials(), args.work / "trainings", args.workers, args.cifar10_root, device, args.inception
    )
    report.write(results, profile, records, layers, slopes)
    print(f"report: {results / 'tables.md'}")
    return results


if __name__ == "__main__":
    main()
