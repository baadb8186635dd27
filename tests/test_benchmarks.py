"""The benchmarks run, at their smallest, and print what they promise."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, random_images, run_script, write_folders
from torch import nn

import common
from benchmarks import ablation, shifts
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4

CONFIG = common.Config()


def test_the_throughput_benchmark_prints_rates_ratios_shares_and_limits():
    options = ("--images", "64", "--batch-size", "32", "--turns", "1", "--set", "compile=off")
    command = [sys.executable, "-m", "benchmarks.throughput", *options, "--contenders", "baseline"]
    root, environment = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^baseline +\d+\.\d +\d+\.\d +\d+\.\d +1\.00 ", result.stdout, re.M)
    assert re.search(r"^baseline: .*convolution, backward \d+%", result.stdout, re.M)
    assert re.search(r"^baseline: at most [\d,]+ images/s by arithmetic", result.stdout, re.M)


# ---- Ablation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reference"), [("baseline", MobileNetV4), ("all", enhanced_mobilenetv4)])
def test_no_idea_is_the_baseline_and_all_are_the_enhanced_network(name, reference, monkeypatch):
    built = []
    monkeypatch.setattr(common, "main", lambda _, build, arguments: built.append(build(10, **arguments(CONFIG))))
    torch.manual_seed(0)
    ablation.train(name)
    torch.manual_seed(0)
    network, (other,) = reference(10), built
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    for model in (network, other):
        torch.manual_seed(1)
        model.stage4[3].project[1].weight.data.fill_(1)  # a branch that counts
    images = torch.randn(4, 3, 16, 16)
    outputs = []
    for model in (network, other):
        torch.manual_seed(2)
        outputs.append(model(images))
    assert torch.equal(*outputs)


def test_each_network_of_the_ablation_has_the_ideas_of_its_name(monkeypatch):
    built = []
    monkeypatch.setattr(common, "main", lambda _, build, arguments: built.append(build(10, **arguments(CONFIG))))
    for name in ablation.IDEAS:
        ablation.train(name)
        network, has = built.pop(), {}
        parts = list(network.modules())
        has["squeeze-excitation"] = any(type(part).__name__ == "SqueezeExcitation" for part in parts)
        has["silu"] = any(isinstance(part, nn.SiLU) for part in parts)
        assert has["silu"] != any(isinstance(part, nn.ReLU6) for part in parts)
        has["stochastic-depth"] = network.stage4[-1].stochastic_depth.p == 0.1
        for idea, present in has.items():
            assert present == (name in (idea, "all") or (name.startswith("all-but") and idea not in name))


def run_ablation(monkeypatch, tmp_path, *flags):
    """Run it with made-up results in place of trainings; return which were trained."""
    trained = []

    def measure(name, seed, flags, runs):
        trained.append((name, seed))
        accuracy = 90 + 2 * ablation.IDEAS[name][2] + [0.0, 0.4, -0.4][seed]
        device = "another" if seed == 2 and name == "all" else "cpu"
        return {"accuracy": f"{accuracy:.2f}", "parameters": 3_056_370, "device": device, "versions": "torch 2"}

    own = ["--synthetic", "--table", str(tmp_path / "a.csv"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["ablation", *own, *flags])
    monkeypatch.setattr(ablation, "measure", measure)
    ablation.main()
    return trained


def test_the_ablation_skips_what_is_done_and_tells_noise_from_differences(monkeypatch, tmp_path, capsys):
    assert len(run_ablation(monkeypatch, tmp_path, "--seeds", "2")) == 16
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text("".join(text.splitlines(keepends=True)[:-1]))  # as if it had been killed
    assert run_ablation(monkeypatch, tmp_path, "--seeds", "3")[:2] == [("all-but-silu", 1), ("baseline", 2)]
    capsys.readouterr()
    assert run_ablation(monkeypatch, tmp_path, "--seeds", "3") == []
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len({(row["network"], row["seed"]) for row in rows}) == len(rows) == 24
    lines = capsys.readouterr().out.splitlines()
    # 0.65 = 2 x 0.4 x sqrt(1 / 3 + 1 / 3)
    silu = next(line for line in lines if line.startswith("silu "))
    assert re.search(r"^silu +3 +92\.00 +0\.40 +\+2\.00 \+- 0\.65 +\+0\.00 \+- 0\.65 within noise +3,056,370$", silu)
    assert re.search(r"^stochastic-depth +3 +90\.00 +0\.40 +\+0\.00 \+- 0\.65 within noise", "\n".join(lines), re.M)
    # 0.33 = 2 x 0.4 x sqrt(8 / 3) / 4
    assert "the four networks with silu less the four without it: +2.00 +- 0.33" in lines
    assert "squeeze-excitation less the four without it: +0.00 +- 0.33 within noise" in "\n".join(lines)
    assert "0.40 points (16 degrees of freedom)" in lines[-3]
    assert lines[-1].startswith("notice: the runs are of 2 kinds of machine")


def test_runs_with_other_settings_are_another_ablation(monkeypatch, tmp_path, capsys):
    assert len(run_ablation(monkeypatch, tmp_path, "--seeds", "1")) == 8
    assert "unknown noise" in capsys.readouterr().out
    assert len(run_ablation(monkeypatch, tmp_path, "--seeds", "1", "--epochs", "7")) == 8
    assert "after 7 epochs" in capsys.readouterr().out


def test_a_run_of_the_ablation_is_a_training_like_any_other(tmp_path):
    flags = ["--synthetic", "--epochs", "1", "--image-size", "16", "--threads", "1"]
    row = ablation.measure("silu", 1, flags, tmp_path)
    assert row["parameters"] == 3_056_370
    accuracies = json.loads((tmp_path / "silu-1" / "summary.json").read_text())["test_accuracy"]
    assert [float(row[key]) for key in ("accuracy", "raw", "with_flip")] == pytest.approx(
        [accuracies[key] for key in ("averaged", "raw", "averaged_tta")], abs=0.006
    )
    saved = common.load_checkpoint(tmp_path / "silu-1" / "checkpoint.pt")
    assert saved["network"]["silu"] is True
    assert saved["recipe"]["seed"] == 1
    with pytest.raises(common.RunError, match="silu with seed 1: training ended with status 1"):
        ablation.measure("silu", 1, [*flags, "--learning-rate", "0.01"], tmp_path)


# ---- Shifts --------------------------------------------------------------------------------------------------------


def test_shifts_move_the_content_and_reflect_at_the_borders():
    images = torch.from_numpy(random_images(3, 1))
    for down, right in ((0, 0), (2, 0), (-2, 0), (0, 2), (2, -2)):
        padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), [2] * 4, mode="reflect")
        expected = padded[:, :, 2 - down : 34 - down, 2 - right : 34 - right].permute(0, 2, 3, 1)
        assert torch.equal(shifts.shift(images, down, right).float(), expected)


def test_the_accuracy_of_shifted_images_is_printed_for_every_direction(folders, tmp_path):
    run = ["--epochs", "1", "--batch-size", "32", "--output-dir", tmp_path / "run"]
    assert run_script("enhanced", "--data-dir", folders, *run).returncode == 0
    command = [sys.executable, "-m", "benchmarks.shifts", str(tmp_path / "run" / "checkpoint.pt"), "--data-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = dict(cwd=Path(__file__).parents[1], env=environment, text=True, capture_output=True)
    result = subprocess.run([*command, str(folders)], **start)
    assert result.returncode == 0, result.stderr
    found = [float(value) for value in re.findall(r"right +(\d+\.\d\d)%$", result.stdout, re.M)]
    assert len(found) == 9
    mean, lowest = map(float, re.findall(r"mean of the eight (.+)%, lowest (.+)%", result.stdout)[0])
    assert mean == pytest.approx(sum(found[1:]) / 8, abs=0.011)
    assert lowest == min(found[1:])
    other = write_folders(tmp_path / "other", classes=[*CLASSES, "truck"])
    refused = subprocess.run([*command, str(other)], **start)
    assert refused.returncode == 1
    assert "its classes are" in refused.stderr and refused.stderr.count("\n") == 1
