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
from helpers import ON_CPU, REPOSITORY, Tiny, equal_runs, flags, new_tiny, small_data, start, wait_for
from tqdm import tqdm

import common
from training import processes
from training.config import Config, RunError
from training.processes import Processes

EPOCHS = 8
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def torchrun(*flags: object, number: int, restarts: int = 0, patch: str = "") -> subprocess.Popen:
    """Start the baseline in so many processes, as README says, on a port of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone")
    launcher += (f"--nproc-per-node={number}", f"--max-restarts={restarts}")
    script = ["mobilenetv4_baseline.py"]
    if patch:
        runner = "import runpy, sys; sys.argv.pop(0); sys.path.insert(0, '')"
        script = [sys.executable, "-c", f"{runner}\n{patch}\nrunpy.run_path(sys.argv[0], run_name='__main__')", *script]
        launcher += ("--no-python",)
    return subprocess.Popen(
        [sys.executable, *launcher, *script, *map(str, (*ON_CPU, *flags))],
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


def is_alive(pid: int) -> bool:
    """Return whether a process, not waited for by this one, still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- Real jobs -----------------------------------------------------------------------------------------------------

DIGESTS = """
import common, hashlib, pathlib
evaluate = common.evaluate
def look(state, data, config, processes):
    digest = hashlib.sha256()
    for network in (state.raw, state.averaged):
        for tensor in network.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    results = evaluate(state, data, config, processes)
    digest.update(repr(results).encode())
    (pathlib.Path(config.output_dir) / f"digest-{processes.rank}").write_text(digest.hexdigest())
    return results
common.evaluate = look
"""


@LINUX
@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])  # sums of three depend on their order
def test_processes_hold_equal_weights_and_killed_ones_end_and_resume_as_if_nothing_had_been(number, folders, tmp_path):
    def job(output, **options):
        return torchrun(*flags(folders, output, EPOCHS), "--batch-size", 30, number=number, **options)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(job(whole, patch=DIGESTS))
    assert output.count(f"0 of {EPOCHS} epochs done") == 1  # one of them prints
    assert f"{number} x 1 threads" in output
    assert len({(whole / f"digest-{rank}").read_text() for rank in range(number)}) == 1
    names = {path.name for path in whole.iterdir() if not path.name.startswith("digest")}
    assert names == {".lock", "checkpoint.pt", "checkpoint.previous.pt", "metrics.csv", "summary.json"}
    assert sum(map(sum, json.loads((whole / "summary.json").read_text())["confusion_matrix"])) == 7

    # torchrun itself is killed: its workers end
    process = job(killed)
    wait_for(killed / "metrics.csv", process)
    workers = workers_of(process)
    assert len(workers) == number and all(map(is_alive, workers))
    process.kill()
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()

    # a worker is killed: the job ends with an error, or is restarted and resumes
    for restarts in (0, 1):
        (killed / "metrics.csv").unlink()  # written anew after each epoch
        process = job(killed, restarts=restarts)
        wait_for(killed / "metrics.csv", process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=100)
        assert (process.returncode == 0) == bool(restarts), errors
    assert output.count("resuming after epoch") + output.count("nothing to train") == 2
    assert equal_runs(killed / "checkpoint.pt", whole / "checkpoint.pt")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    accuracies = []
    for name in ("one", "two"):
        output = tmp_path / name
        learning = ("--synthetic", "--image-size", 16, "--epochs", 6, "--batch-size", 64, "--output-dir", output)
        finish(torchrun(*learning, number=2) if name == "two" else start("baseline", *learning))
        accuracies.append(json.loads((output / "summary.json").read_text())["test_accuracy"]["averaged"])
    assert min(accuracies) > 80
    assert accuracies[0] == pytest.approx(accuracies[1], abs=6)  # of 400 images: three standard errors


# ---- The parts, with the other processes made up -------------------------------------------------------------------


def test_without_cutmix_the_shares_of_all_processes_are_the_batches_of_one(monkeypatch):
    data, config = small_data(), Config(epochs=1, batch_size=6, precision="fp32", cutmix=0.0)
    monkeypatch.setattr(Processes, "average", lambda self, tensors: None)
    drawn = set()  # as by stochastic depth

    def batches(group: Processes) -> list[torch.Tensor]:
        state, seen = new_tiny(config), []

        def loss_fn(images, labels):
            seen.append(torch.cat([images.flatten(1), labels[:, None]], 1))
            drawn.add(torch.rand(()).item())
            return state.raw(images.permute(0, 3, 1, 2).float()).square().mean()

        common.train_epoch(state, loss_fn, data, config, 1, tqdm(disable=True), group)
        return seen

    alone = batches(Processes())
    for size in (2, 3):
        drawn.clear()
        shares = [batches(Processes(rank, size)) for rank in range(size)]
        assert len(drawn) == size * len(alone)
        assert all(torch.equal(torch.cat(share), whole) for *share, whole in zip(*shares, alone, strict=True))


def test_each_process_evaluates_its_share_and_none_twice(monkeypatch):
    data, config, network = small_data(test=1100), Config(precision="fp32"), Tiny()
    alone = common.predict(network, data.test_images, data, config)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda tensor: None)
    shares = [
        common.predict(network, data.test_images, data, config, processes=Processes(rank, 3)) for rank in range(3)
    ]
    assert torch.equal(sum(shares), alone)
    assert [int((share[:, 0] != 0).sum()) for share in shares] == [500, 350, 250]  # batches of 250


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
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(torch.tensor([3.0, 4.0, 5.0])))
    Processes(0, 2).average(tensors)
    assert torch.equal(tensors[0], torch.tensor([[2.0, 3.0]]))
    assert torch.equal(tensors[1], torch.tensor([4.0]))


@pytest.mark.parametrize(("batch_size", "size"), [(128, 3), (4, 4)])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, size):
    data, config = small_data(train=200), Config(batch_size=batch_size)
    with pytest.raises(RunError, match=f"--batch-size {batch_size}: {size} processes cannot share it"):
        common.resolve_settings(config, data, None, Processes(0, size))
