"""What is written is whole or not at all, and what is read is what was written or refused by name."""

import errno
import os
import pickle

import pytest
import torch
from conftest import run_script
from test_training import small_data, train

import common
from common import Config, RunError

CONFIG = Config(epochs=1, batch_size=5, precision="fp32")
ABOUT = {"variant": "tiny", "network": {"width": 1.0}, "recipe": CONFIG.recipe(), "data": "23 images", "seed": 0}


@pytest.fixture
def checkpoint(tmp_path):
    """Return the path of a small checkpoint and the state that it holds."""
    state, _ = train(CONFIG)
    common.save_checkpoint(tmp_path / "checkpoint.pt", state, 1, ABOUT)
    return tmp_path / "checkpoint.pt", state


def test_what_was_saved_comes_back(checkpoint):
    path, state = checkpoint
    saved = common.load_checkpoint(path)
    other, _ = train(Config(epochs=1, batch_size=5, precision="fp32", seed=1))
    common.restore(path, saved, other)
    for mine, theirs in ((state.raw, other.raw), (state.averaged, other.averaged)):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    momenta = [
        [values["momentum"] for values in one.optimizers[0].state_dict()["state"].values()] for one in (state, other)
    ]
    assert all(torch.equal(*pair) for pair in zip(*momenta, strict=True))


def test_a_cut_file_is_refused_at_every_length(checkpoint):
    path, _ = checkpoint
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"checkpoint\.pt: not a usable checkpoint"):
            common.load_checkpoint(path)


def test_a_flipped_bit_is_refused_or_changes_no_tensor(checkpoint):
    path, state = checkpoint
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), len(content) // 150):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            saved = common.load_checkpoint(path)
            for name, tensor in state.raw.state_dict().items():
                assert torch.equal(saved["model"][name], tensor)
        except RunError:
            refused += 1
    assert refused > 50


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_payload_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Payload()}, "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(RunError, match="not a usable checkpoint"):
            common.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": common.FORMAT + 1}, "its format is 2"), ({"recipe": None}, "it lacks recipe"), (None, "not a usable")],
)
def test_a_newer_or_foreign_checkpoint_is_refused_with_the_ways_on(checkpoint, change, message):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    content = [1, 2] if change is None else {k: v for k, v in (content | change).items() if v is not None}
    torch.save(content, path)
    with pytest.raises(RunError, match=rf"{message}.*--output-dir.*--fresh"):
        common.load_checkpoint(path)


def test_other_shapes_are_refused(checkpoint):
    path, state = checkpoint
    for part in ("model", "averaged"):
        saved = common.load_checkpoint(path)
        saved[part]["classifier.weight"] = torch.zeros(3, 5)
        with pytest.raises(RunError, match=r"classifier\.weight"):
            common.restore(path, saved, state)
    saved = common.load_checkpoint(path)
    saved["optimizer"][0]["state"][0]["momentum"] = torch.zeros(3)
    with pytest.raises(RunError, match="other shapes"):
        common.restore(path, saved, state)


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_full_disk_is_told_with_path_and_cause_and_leaves_the_old_file_whole(checkpoint, monkeypatch, where):
    path, state = checkpoint
    content = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "open":
        monkeypatch.setattr(common, "open", full, raising=False)
    else:
        monkeypatch.setattr(common.os, where, full)
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be written: No space left on device"):
        common.save_checkpoint(path, state, 2, ABOUT)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_leftover_of_a_dead_run_is_written_over(checkpoint):
    path, state = checkpoint
    path.with_name("checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    common.save_checkpoint(path, state, 2, ABOUT)
    assert common.load_checkpoint(path)["epoch"] == 2
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_every_difference_is_named_with_both_values(checkpoint):
    path, _ = checkpoint
    saved = common.load_checkpoint(path)
    common.check_same_run(path, saved, ABOUT)
    now = ABOUT | {"variant": "other", "data": "24 images", "network": {"width": 2.0}}
    now["recipe"] = ABOUT["recipe"] | {"epochs": 7}
    with pytest.raises(RunError) as caught:
        common.check_same_run(path, saved, now)
    for part in (
        "variant was tiny and is now other",
        "data was 23 images and is now 24 images",
        "width was 1.0 and is now 2.0",
        "epochs was 1 and is now 7",
        "--output-dir",
        "--fresh",
    ):
        assert part in str(caught.value)


def test_a_second_run_in_the_same_place_is_refused_before_any_work(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with common.exclusive(output / ".lock", wait=False):
        result = run_script("baseline", "--synthetic", "--output-dir", output)
    assert result.returncode == 1
    assert result.stderr == f"error: --output-dir {output}: another run is writing there\n"


def test_an_output_directory_that_is_a_file_is_told_before_any_work(tmp_path):
    (tmp_path / "run").write_text("")
    result = run_script("baseline", "--synthetic", "--output-dir", tmp_path / "run")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: --output-dir {tmp_path / 'run'}: File exists\n"


def test_rows_ahead_of_the_checkpoint_are_cut_and_a_fresh_run_leaves_nothing_old(tmp_path):
    data = small_data()
    config = Config(epochs=2, batch_size=5, precision="fp32", compile="off", output_dir=tmp_path)
    state, _ = train(config, epochs=1)
    (tmp_path / "metrics.csv").write_text("epoch,seconds\n1,5.0\n2,9.0\n")
    (tmp_path / "summary.json").write_text("old")
    seconds = common.train(state, data, config, ABOUT, 1)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[1] == "1,5.0"
    assert rows[2].startswith("2,0.")
    assert len(rows) == 3
    assert 5 <= seconds < 9
    state, _ = train(config, epochs=1)
    common.train(state, data, config, ABOUT, 0)
    assert not (tmp_path / "summary.json").exists()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
