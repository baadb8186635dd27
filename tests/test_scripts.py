"""Both scripts as a user runs them, on a small image folder: what they print, write, resume and refuse."""

import csv
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from helpers import CLASSES, REPOSITORY, flags, run_script_here, write_folders
from PIL import Image

from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from training import checkpoint

BUILDERS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}
PARAMETERS = {"baseline": 3_047_403, "enhanced": 4_163_715}  # with the three classes of the small folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("scripts") / "pictures with spaces \u00e9")


@pytest.fixture(scope="module")
def finished(pictures):
    """Return the folder of a finished run of the baseline, which no test changes, and what it printed."""
    result = run_script_here("baseline", *flags(pictures, pictures.parent / "my run \u00e9"))
    assert result.returncode == 0, result.stderr
    return pictures.parent / "my run \u00e9", result.stdout


@pytest.fixture
def copy(finished, tmp_path):
    """Return the folder of a finished run that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "copy")


# ---- What a run leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["baseline", "enhanced"])
def test_a_run_trains_and_leaves_everything_that_is_promised(variant, folders, tmp_path):
    output = tmp_path / "run"
    result = run_script_here(variant, *flags(folders, output))
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stdout + result.stderr  # no progress bar where there is no terminal

    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    assert (saved["format"], saved["variant"], saved["epoch"], saved["seed"]) == (1, variant, 2, 0)
    assert (saved["classes"], saved["image_size"]) == (CLASSES, 32)
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["recipe"]["batch_size"] == 32
    ideas = {"squeeze_excitation": 0.25, "stochastic_depth": 0.1} if variant == "enhanced" else {}
    assert saved["network"] == {"width": 1.15, "strides": [1, 1, 2, 2, 2], **ideas}
    for weights in ("model", "averaged"):
        BUILDERS[variant](num_classes=3, **saved["network"]).load_state_dict(saved[weights])

    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["test_accuracy"]) == {"raw", "averaged", "raw_tta", "averaged_tta"}
    assert (summary["variant"], summary["epochs"], summary["parameters"]) == (variant, 2, PARAMETERS[variant])
    assert set(summary["per_class_accuracy"]) == set(CLASSES)
    assert sum(map(sum, summary["confusion_matrix"])) == 7
    for key in ("headline", "macs", "seconds", "device", "versions", "configuration"):
        assert summary[key]

    rows = list(csv.DictReader((output / "metrics.csv").open()))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == saved["metrics"]
    headline = summary["headline"]
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(summary["test_accuracy"][headline], abs=0.01)
    assert float(rows[-1]["test_loss"]) == pytest.approx(summary["test_loss"][headline], abs=0.001)
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(summary["seconds"], abs=0.1)
    assert {file.name for file in output.iterdir()} == {
        ".lock",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "metrics.csv",
        "summary.json",
    }
    assert checkpoint.load(output / "checkpoint.previous.pt")["epoch"] == 1


# ---- What a run prints ---------------------------------------------------------------------------------------------


def test_the_first_screen_names_network_data_device_versions_and_run_and_how_to_stop_and_resume(finished, pictures):
    run, output = finished
    header = output[: output.index("\n\n")].splitlines()
    assert [line[:10].strip() for line in header] == ["network", "", "data", "device", "versions", "run", ""]
    assert all(line[8:10] == "  " and line[10] != " " for line in header)  # two columns
    network, size, data, device, versions, place, stop = (line[10:] for line in header)
    assert network == "baseline: 3,047,403 parameters, 80.0 M MACs"
    assert size.startswith("32 x 32 pixels, width 1.15, ")
    assert str(pictures) in data and "40 training images, 7 for evaluation" in data
    assert device.startswith("cpu (") and ", 1 x 1 threads, " in device
    assert f"torch {torch.__version__}" in versions
    assert place == f"{run}, 0 of 2 epochs done"
    assert stop == "Ctrl-C stops; the same command resumes after the last finished epoch"


def test_each_epoch_is_one_row_under_its_columns_with_the_time_left(finished):
    table = finished[1].split("\n\n")[1].splitlines()
    assert re.split(r"  +", table[0]) == [
        *("epoch", "learning rate", "loss", "test accuracy", "test loss", "images/s", "seconds", "left")
    ]
    assert [line.split()[0] for line in table[1:]] == ["1", "2"]
    assert len({len(line) for line in table}) == 1
    assert all(re.search(r"\d%  .*  \d+ (s|min)$", line) for line in table[1:])


def test_the_end_is_the_result_the_time_and_commands_that_can_be_copied(finished):
    run, output = finished
    result = output.split("\n\n")[2].splitlines()
    headline = json.loads((run / "summary.json").read_text())["test_accuracy"]["averaged"]
    assert f"test accuracy {headline:6.2f}%  EMA weights (headline)" in result
    assert [line[:14] for line in result[:5]] == ["test accuracy "] * 4 + ["test loss     "]
    assert re.fullmatch(r"training time \d+ s \(\d+ seconds\); next:", result[5])
    commands = [shlex.split(line) for line in result[6:]]
    for command, path in zip(commands, (run / "checkpoint.pt", run / "checkpoint.pt", run), strict=True):
        assert command[:2] == ["python", "-m"]
        assert (REPOSITORY / f"{command[2].replace('.', '/')}.py").is_file()
        assert command[3] == str(path)


def test_a_held_out_accuracy_is_called_so_everywhere(folders, tmp_path):
    result = run_script_here("enhanced", *flags(folders, tmp_path / "run", 1), "--holdout", 6)
    assert result.returncode == 0, result.stderr
    assert "6 training images held out" in result.stdout
    assert not re.search("test (accuracy|loss)", result.stdout)
    assert result.stdout.count("holdout accuracy") == 5
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert "holdout_accuracy" in summary and "test_accuracy" not in summary
    assert "holdout_accuracy,holdout_loss" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(("size", "side"), [(32, 4), (48, 6), (64, 4), (224, 7)])
def test_the_summary_needs_no_data_adds_up_and_shows_the_last_map_of_each_image_size(size, side, tmp_path):
    result = run_script_here("baseline", "--summary", "--image-size", size, "--data-dir", tmp_path / "nothing")
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()[1:]]
    parameters, macs = (sum(int(row[column].replace(",", "")) for row in rows[:-1]) for column in (-2, -1))
    assert rows[-1] == ["total", f"{parameters:,}", f"{macs:,}"]
    assert parameters == 3_056_370
    if size == 32:
        assert macs == 80_020_992
    kinds = [row[1] for row in rows]
    assert [kinds.count(kind) for kind in ("ExtraDW", "IB", "ConvNext")] == [3, 8, 1]
    assert [row[2] for row in rows if row[0] == "head"] == [f"1104 x {side} x {side}"]
    assert not list(tmp_path.iterdir())


# ---- The same command again, and others ----------------------------------------------------------------------------


def test_a_finished_run_trains_nothing_and_writes_its_metrics_again_from_the_checkpoint(finished, copy, pictures):
    content, summary, metrics = (
        (copy / name).read_bytes() for name in ("checkpoint.pt", "summary.json", "metrics.csv")
    )
    (copy / "metrics.csv").unlink()
    os.mkfifo(copy / "metrics.csv")  # opening it would wait for a reader
    again = run_script_here("baseline", *flags(pictures, copy), "--data-url", "http://elsewhere")
    assert again.returncode == 0, again.stderr
    assert "2 of 2 epochs done" in again.stdout and "nothing to train" in again.stdout
    assert again.stdout.split("\n\n")[-1].splitlines()[:6] == finished[1].split("\n\n")[2].splitlines()[:6]
    assert (copy / "metrics.csv").read_bytes() == metrics
    assert (copy / "checkpoint.pt").read_bytes() == content
    assert (copy / "summary.json").read_bytes() == summary  # of what trained, not of what evaluates


def test_other_settings_another_variant_and_other_data_are_refused_by_name(copy, pictures, tmp_path):
    content = (copy / "checkpoint.pt").read_bytes()
    other = run_script_here("baseline", *flags(pictures, copy, 3), "--learning-rate", "0.01")
    more = shutil.copytree(pictures, tmp_path / "more")
    Image.new("RGB", (32, 32)).save(more / "train" / CLASSES[0] / "another.png")
    changed = run_script_here("baseline", *flags(more, copy))
    enhanced = run_script_here("enhanced", *flags(pictures, copy))
    for result, parts in (
        (other, ["epochs was 2 and is now 3", r"learning_rate was 0\.025 and is now 0\.01"]),
        (changed, [r"data was 40 \+ 7 images, \w+ and is now 41 \+ 7 images, \w+"]),
        (enhanced, ["variant was baseline and is now enhanced"]),
    ):
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        for part in [*parts, "--output-dir", "--fresh"]:
            assert re.search(part, result.stderr)
    assert (copy / "checkpoint.pt").read_bytes() == content


def test_a_run_starts_from_the_weights_of_another_and_a_new_classifier_where_classes_differ(finished, copy, tmp_path):
    before, source = checkpoint.load(finished[0] / "checkpoint.pt"), copy / "checkpoint.pt"
    more = write_folders(tmp_path / "more", classes=[*CLASSES, "truck"])
    still = ("--learning-rate", 0, "--adam-learning-rate", 0)
    result = run_script_here("baseline", *flags(more, tmp_path / "run", 1), *still, "--init-from", source)
    assert result.returncode == 0, result.stderr
    after = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert after["init_from"] == before["sha256"][:16]
    for name, _ in MobileNetV4(3).named_parameters():
        if name.startswith("classifier."):
            assert after["model"][name].shape[0] == 4
        else:
            assert torch.equal(after["model"][name], before["averaged"][name])


def test_weights_of_another_network_are_refused_in_one_line(finished, pictures, tmp_path):
    source = finished[0] / "checkpoint.pt"
    result = run_script_here("enhanced", *flags(pictures, tmp_path / "run", 1), "--init-from", source)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"error: {source}: not a usable --init-from file (")


# ---- Command lines -------------------------------------------------------------------------------------------------


def test_a_bad_flag_ends_with_status_2_before_any_work(tmp_path):
    result = run_script_here("baseline", "--epochs", 0, "--output-dir", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.endswith("error: argument --epochs: expected a whole number from 1 to 1,000,000, got '0'\n")
    assert not (tmp_path / "run").exists()
