"""Both scripts as a user runs them: as processes, on a small image folder."""

import csv
import json
import re

import pytest
import torch
from conftest import CLASSES, flags, run_here, run_script, run_script_here, write_folders
from PIL import Image

import common
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from tools import export

BUILDERS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}
PARAMETERS = {"baseline": 3_047_403, "enhanced": 4_163_715}  # with the three classes of the small folder


@pytest.mark.parametrize("variant", ["baseline", "enhanced"])
def test_a_run_trains_and_leaves_everything_that_is_promised(variant, folders, tmp_path):
    output = tmp_path / "run"
    result = run_script(variant, *flags(folders, output))
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stdout + result.stderr  # no progress bar where there is no terminal
    assert len(re.findall(r"^ +[12]  +\d\.\d+  +\d\.\d+  +\d+\.\d\d%", result.stdout, re.M)) == 2

    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    assert (saved["format"], saved["variant"], saved["epoch"], saved["seed"]) == (1, variant, 2, 0)
    assert (saved["classes"], saved["image_size"]) == (CLASSES, 32)
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["recipe"]["batch_size"] == 32
    for weights in ("model", "averaged"):
        network = BUILDERS[variant](num_classes=3, **saved["network"])
        network.load_state_dict(saved[weights])
        assert not [name for name in saved[weights] if "module." in name or "_orig_mod" in name]

    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["test_accuracy"]) == {"raw", "averaged", "raw_tta", "averaged_tta"}
    assert (summary["variant"], summary["epochs"], summary["parameters"]) == (variant, 2, PARAMETERS[variant])
    assert set(summary["per_class_accuracy"]) == set(CLASSES)
    assert sum(map(sum, summary["confusion_matrix"])) == 7
    for key in ("headline", "macs", "seconds", "device", "versions", "configuration"):
        assert summary[key]

    rows = list(csv.DictReader((output / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    headline = summary["test_accuracy"][summary["headline"]]
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(headline, abs=0.01)
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(summary["seconds"], abs=0.1)


def test_a_finished_run_trains_nothing_and_other_settings_are_refused(folders, tmp_path):
    output = tmp_path / "run"
    first = run_script_here("baseline", *flags(folders, output, 1))
    content, summary = ((output / name).read_bytes() for name in ("checkpoint.pt", "summary.json"))
    again = run_script_here("baseline", *flags(folders, output, 1), "--data-url", "http://elsewhere")
    assert again.returncode == 0, again.stderr
    assert "nothing to train" in again.stdout
    accuracies = [re.findall(r"^test_accuracy .*%", result.stdout, re.M) for result in (first, again)]
    assert len(accuracies[0]) == 4
    assert accuracies[0] == accuracies[1]
    assert (output / "summary.json").read_bytes() == summary  # of what trained, not of what evaluates

    evaluated = run_script("baseline", "--evaluate", "--data-dir", folders, "--output-dir", output)
    assert re.findall(r"^test_accuracy .*%", evaluated.stdout, re.M) == accuracies[0]

    nowhere = ("--data-dir", folders / "nowhere", "--data-url", "http://127.0.0.1:9/")  # told before it is looked at
    other = run_script_here("baseline", *flags(folders, output, 3), "--learning-rate", "0.01", *nowhere)
    assert other.returncode == 1
    assert other.stdout == ""
    for part in ("epochs was 1 and is now 3", "learning_rate was 0.025 and is now 0.01", "--output-dir", "--fresh"):
        assert part in other.stderr
    assert other.stderr.count("\n") == 1
    Image.new("RGB", (32, 32)).save(folders / "train" / CLASSES[0] / "another.png")
    changed = run_script_here("baseline", *flags(folders, output, 1))
    assert changed.returncode == 1
    assert re.search(r"data was 40 \+ 7 images, \w+ and is now 41 \+ 7 images, \w+; .*--output-dir", changed.stderr)
    enhanced = run_script_here("enhanced", *flags(folders, output, 1))
    assert enhanced.returncode == 1
    assert "variant was baseline and is now enhanced" in enhanced.stderr
    assert (output / "checkpoint.pt").read_bytes() == content


def test_a_held_out_accuracy_is_called_so_everywhere(folders, tmp_path):
    result = run_script_here("enhanced", *flags(folders, tmp_path / "run", 1), "--holdout", 6)
    assert result.returncode == 0, result.stderr
    assert "test_accuracy" not in result.stdout
    assert result.stdout.count("holdout_accuracy") == 5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "holdout_accuracy" in summary
    assert "test_accuracy" not in summary
    assert "holdout_accuracy" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]


def test_the_summary_needs_no_data_and_adds_up(tmp_path):
    result = run_script_here("baseline", "--summary", "--data-dir", tmp_path / "nothing")
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()[1:]]
    parameters, macs = (sum(int(row[column].replace(",", "")) for row in rows[:-1]) for column in (-2, -1))
    assert (parameters, macs) == (3_056_370, 80_020_992)
    assert rows[-1] == ["total", "3,056,370", "80,020,992"]
    kinds = [row[1] for row in rows]
    assert [kinds.count(kind) for kind in ("ExtraDW", "IB", "ConvNext")] == [3, 8, 1]


def test_made_up_images_say_that_the_accuracy_means_nothing(tmp_path):
    result = run_script_here(
        "baseline", "--synthetic", "--epochs", 1, "--image-size", 16, "--output-dir", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("means nothing") == 2


def test_without_data_and_network_one_line_says_what_to_do(tmp_path):
    result = run_script(
        "enhanced", "--data-dir", tmp_path / "no", "--output-dir", tmp_path / "run", "--data-url", "http://127.0.0.1:9/"
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "--synthetic" in result.stderr


def test_a_bad_flag_ends_with_status_2_before_any_work(tmp_path):
    result = run_script("baseline", "--epochs", 0, "--output-dir", tmp_path / "run")
    assert result.returncode == 2
    assert "--epochs" in result.stderr
    result = run_script_here("baseline", "--crop-padding", 32, "--output-dir", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.endswith("error: crop_padding must be less than image_size 32, got 32\n")
    assert not (tmp_path / "run").exists()


def test_weights_in_half_precision_are_evaluated_and_not_trained_on(folders, tmp_path):
    run, file = tmp_path / "run", tmp_path / "weights.pt"
    trained = run_script_here("baseline", *flags(folders, run, 1), "--recipe", "long", "--cutmix", 0)
    assert trained.returncode == 0, trained.stderr
    result = run_here(export.main, run / "checkpoint.pt", file)
    assert result.returncode == 0, result.stderr
    assert file.stat().st_size < 2.1 * 3_056_370 + 100_000
    evaluated = run_script_here("baseline", "--evaluate", file, "--data-dir", folders)  # which knows its strides
    assert evaluated.returncode == 0, evaluated.stderr
    assert "212,842,240 MACs" in evaluated.stdout
    accuracies = re.findall(r"^test_accuracy averaged.*%", evaluated.stdout, re.M)
    assert accuracies == re.findall(r"^test_accuracy averaged.*%", trained.stdout, re.M)
    assert "test_accuracy raw" not in evaluated.stdout
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(file.read_bytes())
    again = run_script_here("baseline", *flags(folders, tmp_path / "other", 1), "--recipe", "long", "--cutmix", 0)
    assert again.returncode == 1
    assert "weights alone" in again.stderr
    wrong = run_script_here("enhanced", "--evaluate", file, "--data-dir", folders)
    assert wrong.stderr.endswith("variant was baseline and is now enhanced\n")  # with no advice on continuing
    saved = common.load_checkpoint(file)  # as an older program may have saved it
    older = {key: value for key, value in saved["recipe"].items() if key not in ("cutmix", "plain_end")}
    common.write_checkpoint(tmp_path / "older.pt", saved | {"recipe": older})
    evaluated = run_script_here("baseline", "--evaluate", tmp_path / "older.pt", "--data-dir", folders)
    assert evaluated.returncode == 0, evaluated.stderr
    missing = run_script_here("baseline", "--evaluate", tmp_path / "none.pt", "--data-dir", folders)
    assert missing.returncode == 1
    assert "none.pt" in missing.stderr and missing.stderr.count("\n") == 1


def test_a_run_begins_with_the_weights_of_another_and_a_new_classifier_where_classes_differ(folders, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    result = run_script_here("baseline", *flags(folders, first, 1))
    assert result.returncode == 0, result.stderr
    more = write_folders(tmp_path / "more", classes=[*CLASSES, "truck"])
    still = ("--learning-rate", 0, "--adam-learning-rate", 0, "--init-from", first / "checkpoint.pt")
    result = run_script_here("baseline", *flags(more, second, 1), *still)
    assert result.returncode == 0, result.stderr
    assert f"beginning with the weights of {first / 'checkpoint.pt'} and a new classifier of 4 classes" in result.stdout
    before, after = (common.load_checkpoint(run / "checkpoint.pt") for run in (first, second))
    for name, _ in MobileNetV4(3).named_parameters():
        if name.startswith("classifier."):
            assert after["model"][name].shape[0] == 4
        else:
            assert torch.equal(after["model"][name], before["averaged"][name])
    result = run_script_here("baseline", *flags(folders, third, 1), *still)
    assert "classifier" not in result.stdout
    same = common.load_checkpoint(third / "checkpoint.pt")["model"]
    assert torch.equal(same["classifier.weight"], before["averaged"]["classifier.weight"])
    # the same command goes on, another beginning is another run, and evaluation needs none
    assert "nothing to train" in run_script_here("baseline", *flags(folders, third, 1), *still).stdout
    other = run_script_here("baseline", *flags(folders, third, 1), *still[:4])
    assert other.returncode == 1
    assert "init_from was" in other.stderr and "is now None" in other.stderr
    assert run_script_here("baseline", "--evaluate", "--data-dir", folders, "--output-dir", third).returncode == 0


def test_what_cannot_be_begun_with_is_told_in_one_line(folders, tmp_path):
    assert run_script_here("baseline", *flags(folders, tmp_path / "run", 1)).returncode == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    wrong = run_script_here("enhanced", *flags(folders, tmp_path / "other", 1), "--init-from", checkpoint)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith(f"error: --init-from {checkpoint}: the weights of another network")
    missing = run_script_here("baseline", *flags(folders, tmp_path / "other", 1), "--init-from", tmp_path / "none.pt")
    assert missing.returncode == 1
    assert missing.stderr == f"error: --init-from {tmp_path / 'none.pt'}: not a file\n"
    own = run_script_here("baseline", *flags(folders, tmp_path / "run", 1), "--fresh", "--init-from", checkpoint)
    assert own.returncode == 1
    assert "it would be replaced" in own.stderr
    assert checkpoint.exists()
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "strides"), [(48, "[1, 1, 2, 2, 2]"), (64, "[1, 2, 2, 2, 2]"), (224, "[2, 2, 2, 2, 2]")]
)
def test_the_strides_follow_the_image_size_and_are_told(size, strides, folders, tmp_path):
    result = run_script_here("baseline", *flags(folders, tmp_path / "run", 1), "--image-size", size)
    assert result.returncode == 0, result.stderr
    assert f"strides {strides}" in result.stdout
