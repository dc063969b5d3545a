"""Many trainings, some at a time; what an interrupted run has finished is not repeated."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.files import write_whole
from experiments.plan import Trial
from experiments.trainings.trial import run_trial


def file_of(folder: Path, trial: Trial) -> Path:
    """Return where the trial's record is kept."""
    return folder / f"{trial.key}.json"


def run_all(trials: list[Trial], folder: Path, workers: int, *options: Any) -> None:
    """Run the trials that have no file in `folder` yet, `workers` at a time.

    options: of `run_trial`, behind the trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [trial for trial in trials if not file_of(folder, trial).exists()]
    progress = tqdm(total=len(trials), initial=len(trials) - len(missing), desc="trainings", unit="run", smoothing=0.05)
    with progress, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            futures = {pool.submit(run_trial, trial, *options): trial for trial in missing}
            for future in as_completed(futures):
                write_whole(file_of(folder, futures[future]), json.dumps(future.result()))
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_all(trials: list[Trial], folder: Path) -> list[dict[str, Any]]:
    """Return the records of those trials that have one."""
    return [json.loads(file.read_text()) for trial in trials if (file := file_of(folder, trial)).exists()]
