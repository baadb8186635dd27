"""What is written is whole or not at all, and what is read is what was written or refused by name."""

import errno
import hashlib
import math
import os
import pickle
import zipfile

import pytest
import torch
from conftest import run_script_here
from test_training import small_data, train

import common
from common import Config, RunError

CONFIG = Config(epochs=1, batch_size=5, precision="fp32")
ABOUT = {"variant": "tiny", "network": {"width": 1.0}, "recipe": CONFIG.decisive(), "data": "23 images", "seed": 0}


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


def equal(one, other) -> bool:
    """Compare nested plain values and tensors."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def check_damage(path, lengths, flips) -> None:
    """Cut the file to each length and flip each (position, bit): it must be refused by name or load as it was."""
    content, whole, refused = path.read_bytes(), common.load_checkpoint(path), 0
    for length in lengths(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"checkpoint\.pt: not a usable checkpoint"):
            common.load_checkpoint(path)
    for position, bit in flips(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        try:
            assert equal(common.load_checkpoint(path), whole), (position, bit)
        except RunError as error:
            assert "checkpoint.pt: not a usable checkpoint" in str(error)
            refused += 1
    assert refused > 50


def test_a_cut_file_or_a_flipped_bit_is_refused_or_changes_nothing(checkpoint):
    check_damage(
        checkpoint[0],
        lambda size: [*range(0, size, size // 40), size - 1],
        lambda size: [(position, position % 8) for position in range(0, size, size // 300)],
    )


@pytest.mark.slow
def test_every_cut_and_every_flipped_bit_is_refused_or_changes_nothing(checkpoint):
    check_damage(checkpoint[0], range, lambda size: [(position, bit) for position in range(size) for bit in range(8)])


def sealed(content: bytes) -> bytes:
    """Add the right checksum to what somebody else made."""
    return content[:-2] + b"\x20\x00" + hashlib.sha256(content[:-2]).digest()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_payload_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.write_checkpoint(tmp_path / "zip.pt", {"format": 1, "model": Payload()})
    (tmp_path / "pickle.pt").write_bytes(sealed(pickle.dumps(Payload()) + b"  "))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(RunError, match="not a usable checkpoint"):
            common.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": common.FORMAT + 1}, "its format is 2"),
        ({"recipe": None}, "it lacks recipe"),
        ({"epoch": "many", "network": [1]}, "it lacks network, epoch"),
        (None, "not a usable"),
    ],
)
def test_a_newer_or_foreign_checkpoint_is_refused(checkpoint, change, message):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    content = [1, 2] if change is None else {k: v for k, v in (content | change).items() if v is not None}
    common.write_checkpoint(path, content)
    with pytest.raises(common.CheckpointError, match=message):
        common.load_checkpoint(path)


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_a_small_file_that_would_fill_the_memory_is_refused(checkpoint, how):
    path, state = checkpoint
    state.raw.classifier.weight.data = torch.zeros(100, 1000)
    common.save_checkpoint(path, state, 1, ABOUT)
    with zipfile.ZipFile(path) as archive:
        items = [(item.filename, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, content in items:
            archive.writestr(name, content)
        if how == "overlapping":  # many names for one content
            archive.filelist += [max(archive.filelist, key=lambda item: item.file_size)] * 9
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(RunError, match="it unpacks to more than its"):
        common.load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 0}, "its epoch is 0 of 1"),
        ({"epoch": 10**9}, "its epoch is 1000000000 of 1"),
        ({"network": {"width": torch.zeros(2)}}, "a setting is a Tensor"),
        ({"network": {"strides": [[1], [1]]}}, "a setting is a list"),
    ],
)
def test_odd_contents_are_refused(checkpoint, change, message):
    path, _ = checkpoint
    common.write_checkpoint(path, torch.load(path, weights_only=True) | change)
    with pytest.raises(RunError, match=rf"not a usable checkpoint \({message}"):
        common.load_checkpoint(path)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink("nowhere", path),
        lambda path: os.symlink("/dev/zero", path),
    ):
        make(path)
        with pytest.raises(RunError, match=r"checkpoint\.pt: not a file"):
            common.load_checkpoint(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_run_whose_checkpoint_has_gone_is_not_started_over_unasked(tmp_path):
    command = ("baseline", "--synthetic", "--image-size", 16, "--epochs", 1, "--output-dir", tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    result = run_script_here(*command)
    assert result.returncode == 1
    assert "summary.json is of a finished run whose checkpoint.pt is gone; give this run a place" in result.stderr
    assert (tmp_path / "summary.json").exists()
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoint.pt").symlink_to("a disk that is not there")
    result = run_script_here(*command)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path / 'checkpoint.pt'}: not a file\n"


def test_a_temporary_that_is_a_link_leads_nowhere(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.tmp").symlink_to("victim")
    (tmp_path / ".lock").symlink_to("victim")
    with common.exclusive(tmp_path / ".lock", wait=False), common.replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_settings_of_a_foreign_checkpoint_that_are_of_another_kind_are_refused(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    recipe = {"epochs": 1, "holdout": "some", "seed": 0}
    foreign = {"format": 1, "variant": "baseline", "network": {}, "recipe": recipe, "data": "", "epoch": 1}
    common.write_checkpoint(output / "checkpoint.pt", foreign | {"model": {}, "averaged": {}})
    result = run_script_here("baseline", "--synthetic", "--evaluate", "--output-dir", output)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {output / 'checkpoint.pt'}: not a usable checkpoint (invalid literal")
    assert result.stderr.count("\n") == 1


def test_other_shapes_or_names_and_values_that_are_not_finite_are_refused(checkpoint):
    path, state = checkpoint
    for part in ("model", "averaged"):
        for value, message in (
            (torch.zeros(3, 5), r"classifier\.weight"),
            (torch.full((3, 4), math.nan), "not finite"),
        ):
            saved = common.load_checkpoint(path)
            saved[part]["classifier.weight"] = value
            with pytest.raises(RunError, match=message):
                common.restore(path, saved, state)
    good = {"momentum": torch.zeros(8, 3, 3, 3)}
    for values in ({"momentum": torch.zeros(3)}, {}, {"velocity": good["momentum"]}):  # {} would start over unnoticed
        saved = common.load_checkpoint(path)
        saved["optimizer"][0]["state"][0] = values
        with pytest.raises(RunError, match="other names or shapes"):
            common.restore(path, saved, state)


def test_the_settings_of_the_optimizers_are_the_command_lines_and_not_the_files(checkpoint):
    path, state = checkpoint
    saved = common.load_checkpoint(path)
    for optimizer in saved["optimizer"]:
        optimizer["param_groups"] = [{"lr": 7.0, "momentum": 7.0, "params": []}]
    common.restore(path, saved, state)
    assert state.optimizers[0].param_groups[0]["momentum"] == CONFIG.momentum
    assert state.optimizers[1].param_groups[0]["betas"] == (0.9, 0.999)


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
    path.unlink()
    path.with_name("checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    common.save_checkpoint(path, state, 1, ABOUT)
    common.load_checkpoint(path)
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
    ):
        assert part in str(caught.value)


def test_a_second_run_in_the_same_place_is_refused_before_any_work(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with common.exclusive(output / ".lock", wait=False):
        result = run_script_here("baseline", "--synthetic", "--output-dir", output)
    assert result.returncode == 1
    assert result.stderr == f"error: --output-dir {output}: another run is writing there\n"


def test_an_output_directory_that_is_a_file_is_told_before_any_work(tmp_path):
    (tmp_path / "run").write_text("")
    result = run_script_here("baseline", "--synthetic", "--output-dir", tmp_path / "run")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: --output-dir {tmp_path / 'run'}: File exists\n"


def test_rows_ahead_of_the_checkpoint_are_cut_and_a_fresh_run_leaves_nothing_old(tmp_path):
    data = small_data()
    config = Config(epochs=2, batch_size=5, precision="fp32", compile="off", output_dir=tmp_path)
    state, _ = train(config, epochs=1)
    row = "1,0.01,1.5,90.00,averaged,300.0,5.0"
    (tmp_path / "metrics.csv").write_text(f"epoch,...\n{row}\n2,0.01,1.5,90.00,averaged,300.0,9.0\n")
    (tmp_path / "summary.json").write_text("old")
    seconds = common.train(state, data, config, ABOUT, 1)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[1] == row
    assert rows[2].startswith("2,0.")
    assert len(rows) == 3
    assert 5 <= seconds < 9
    state, _ = train(config, epochs=1)
    common.train(state, data, config, ABOUT, 0)
    assert not (tmp_path / "summary.json").exists()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
