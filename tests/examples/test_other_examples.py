"""The examples beside the GAN's training, each as a user runs it.

diffusers, transformers and lightning (the extra `models`) are not installed in CI, where their tests are skipped.
"""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_ddp():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(EXAMPLES / "ddp.py"), "--steps", "2", "--batch", "4"]
    done = subprocess.run([*launcher, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 1: discriminator" in done.stdout
    assert "the same bits in all 2 processes" in done.stdout


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
