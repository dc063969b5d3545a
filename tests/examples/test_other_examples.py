"""The examples beside the GAN's training, each as a user runs it.

diffusers, transformers and lightning (the extra `models`) are not installed in CI, where their tests are skipped.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import FSDP2_ON_CPUS, WITHOUT_FSDP2

EXAMPLES = Path(__file__).parents[2] / "examples"

NAMED_THREADS = """
import os, runpy, sys
from pathlib import Path

found = Path(sys.argv[0]).with_name("threads-" + os.environ["RANK"])  # what two processes print can be mixed up
sys.path.insert(0, str(Path(sys.argv[1]).parent))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
found.write_text(" ".join(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""


def launch(*command: str) -> str:
    """Run a script in two processes, and return what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp():
    printed = launch(str(EXAMPLES / "ddp.py"), "--steps", "2", "--batch", "4")
    assert "step 1: discriminator" in printed
    assert "the same bits in all 2 processes" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_ddp_ends_all_threads_of_its_process_group_before_python_ends(tmp_path):
    """One that drops its last tensor later, on a busy machine, aborts the process."""
    script = tmp_path / "named_threads.py"
    script.write_text(NAMED_THREADS)
    launch(str(script), str(EXAMPLES / "ddp.py"), "--steps", "1", "--batch", "4")
    names = [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)]
    assert all("python" in found and "gloo" not in found for found in names), names


@pytest.mark.skipif(not FSDP2_ON_CPUS, reason=WITHOUT_FSDP2)
def test_sharded():
    done = subprocess.run([sys.executable, str(EXAMPLES / "sharded.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " loss " in line]
    assert [line.partition(" loss ")[0].strip() for line in lines] == [
        "one process",
        "DDP",
        "FSDP2",
        "FSDP2, bfloat16",
        "tensor parallel",
        "FSDP2 and tensor parallel",
    ]


def test_real_models(capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import real_models

    real_models.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(real_models.MODELS)


def test_lightning_module(tmp_path):
    pytest.importorskip("lightning")
    import lightning_module
    import torch

    trainer = lightning_module.main(["--steps", "2", "--out", str(tmp_path)])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    now = trainer.model.state_dict()
    assert any(key.endswith("_u_in") for key in saved)
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[key], now[key]) for key in saved)
