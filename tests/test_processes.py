"""Several processes train as one does: the same order, equal weights, each test image counted once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, flags, start
from test_training import Tiny, small_data
from tqdm import tqdm

import common
from common import Config, RunError


def torchrun(*flags: object, restarts: int = 0, patch: str = "", variant: str = "baseline") -> subprocess.Popen:
    """Start the script in two processes, as README says, on a port of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}")
    script = [f"mobilenetv4_{variant}.py"]
    if patch:
        runner = "import runpy, sys; sys.argv.pop(0); sys.path.insert(0, '')"
        script = [sys.executable, "-c", f"{runner}\n{patch}\nrunpy.run_path(sys.argv[0], run_name='__main__')", *script]
        launcher += ("--no-python",)
    return subprocess.Popen(
        [sys.executable, *launcher, *script, *map(str, ("--threads", 1, *flags))],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 200) -> str:
    """Return the output of a job that ends well."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output


def workers_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


DIGESTS = """
import common, hashlib, pathlib
evaluate = common.evaluate
def look(state, data, config):
    digest = hashlib.sha256()
    for network in (state.raw, state.averaged):
        for tensor in network.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    results = evaluate(state, data, config)
    digest.update(repr(results).encode())
    (pathlib.Path(config.output_dir) / f"digest-{common.rank_and_size()}").write_text(digest.hexdigest())
    return results
common.evaluate = look
"""


def test_two_processes_hold_equal_weights_and_one_of_them_writes(folders, tmp_path):
    output = finish(torchrun(*flags(folders, tmp_path / "run"), patch=DIGESTS, variant="enhanced"))
    assert output.count("training: 0 of 2 epochs done") == 1
    assert "2 x 1 threads" in output
    digests = [(tmp_path / "run" / f"digest-({rank}, 2)").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("digest")}
    assert names == {".lock", "checkpoint.pt", "metrics.csv", "summary.json"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(map(sum, summary["confusion_matrix"])) == 7


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    accuracies = []
    for name in ("one", "two"):
        learning = (
            "--synthetic",
            "--image-size",
            16,
            "--epochs",
            6,
            "--batch-size",
            64,
            "--output-dir",
            tmp_path / name,
        )
        finish(torchrun(*learning) if name == "two" else start("baseline", *learning))
        accuracies.append(json.loads((tmp_path / name / "summary.json").read_text())["test_accuracy"]["averaged"])
    assert min(accuracies) > 80
    assert accuracies[0] == pytest.approx(accuracies[1], abs=8)  # of 320 images: three standard errors


def test_a_job_whose_worker_is_killed_ends_with_an_error_or_is_restarted_and_continues(folders, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(torchrun(*flags(folders, undisturbed, 5)))
    for restarts in (0, 1):
        process = torchrun(*flags(folders, killed, 5), restarts=restarts)
        epoch = 0 if restarts == 0 else common.load_checkpoint(killed / "checkpoint.pt")["epoch"]
        while (
            not (killed / "checkpoint.pt").exists()
            or common.load_checkpoint(killed / "checkpoint.pt")["epoch"] <= epoch
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=100)
        assert (process.returncode == 0) == bool(restarts), errors
    assert output.count("continuing after epoch") == 2
    assert (killed / "checkpoint.pt").read_bytes() == (undisturbed / "checkpoint.pt").read_bytes()


# ---- The parts, with the other processes made up -------------------------------------------------------------------


def test_the_shares_of_all_processes_are_the_batches_of_one(monkeypatch):
    data, config = small_data(), Config(epochs=1, batch_size=6, precision="fp32")
    monkeypatch.setattr(common, "average_processes", lambda tensors: None)

    def batches(rank: int, size: int) -> list[torch.Tensor]:
        monkeypatch.setattr(common, "rank_and_size", lambda: (rank, size))
        network, seen = Tiny(), []
        state = common.State(network, Tiny(), common.make_optimizers(network, config))

        def loss_of(images, labels):
            seen.append(torch.cat([images.flatten(1), labels[:, None]], 1))
            return network(images.permute(0, 3, 1, 2).float()).square().mean()

        common.train_epoch(state, loss_of, data, config, 1, tqdm(disable=True))
        return seen

    alone = batches(0, 1)
    for size in (2, 3):
        shares = [batches(rank, size) for rank in range(size)]
        assert all(torch.equal(torch.cat(share), whole) for *share, whole in zip(*shares, alone, strict=True))


def test_each_process_evaluates_its_share_and_none_twice(monkeypatch):
    data, config, network = small_data(test=1100), Config(precision="fp32"), Tiny()
    alone = common.predict(network, data.test_images, data, config)
    monkeypatch.setattr(common.dist, "all_reduce", lambda tensor: None)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(common, "rank_and_size", lambda rank=rank: (rank, 3))
        shares.append(common.predict(network, data.test_images, data, config))
    assert torch.equal(sum(shares), alone)
    assert all((share[:, 0] != 0).sum() in (350, 500) or (share[:, 0] != 0).sum() == 250 for share in shares)


def test_large_images_are_evaluated_a_few_at_a_time():
    batches = []

    def network(images: torch.Tensor) -> torch.Tensor:
        batches.append(len(images))
        return images.mean((2, 3))

    network.eval = lambda: None
    data, config = small_data(), Config(precision="fp32")
    for size, most in ((32, 250), (128, 128), (512, 8)):
        batches.clear()
        common.predict(network, torch.zeros(300, 1, 1, 3, dtype=torch.uint8).expand(300, size, size, 3), data, config)
        assert max(batches) == most
        assert sum(batches) == 300


def test_tensors_are_averaged_over_processes_in_place(monkeypatch):
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]
    monkeypatch.setattr(common, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([3.0, 4.0, 5.0])))
    common.average_processes(tensors)
    assert torch.equal(tensors[0], torch.tensor([[2.0, 3.0]]))
    assert torch.equal(tensors[1], torch.tensor([4.0]))


@pytest.mark.parametrize(("batch_size", "size"), [(128, 3), (4, 4)])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, size, monkeypatch):
    monkeypatch.setattr(common, "rank_and_size", lambda: (0, size))
    with pytest.raises(RunError, match=f"--batch-size {batch_size}: {size} processes cannot share it"):
        common.settle(Config(batch_size=batch_size), torch.device("cpu"), 1000, None)
