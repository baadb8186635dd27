"""The benchmarks run, at their smallest, and print what they promise."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CLASSES, REPOSITORY, Tiny, random_images, run_here, run_tiny, write_folders
from torch import nn

import common
from benchmarks import ablation, mps_check, shifts, throughput, time_to_accuracy
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from tools import BUILDERS, Trained
from training import checkpoint, devices
from training.config import Config, RunError
from training.data import load_data
from training.summary import count_parameters

# ---- Throughput ----------------------------------------------------------------------------------------------------


def test_the_throughput_benchmark_prints_rates_ratios_shares_and_limits(monkeypatch):
    in_a_process = throughput.turn

    def turn(name, arguments):
        if not name.startswith("profile"):
            return in_a_process(name, arguments)
        return json.loads(run_here(lambda: throughput.work(name, throughput.parse(arguments))).stdout)

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(throughput, "turn", turn)
    monkeypatch.setitem(throughput.SIDES, "cpu", 128)
    options = ("--images", "8", "--batch-size", "8", "--turns", "1", "--set", "compile=off")
    result = run_here(throughput.main, *options, "--contenders", "baseline")
    assert re.search(r"^baseline +\d+\.\d +\d+\.\d +\d+\.\d +1\.00 ", result.stdout, re.M)
    assert re.search(r"^baseline: .*convolution, backward \d+%", result.stdout, re.M)
    assert re.search(r"^baseline: at most [\d,]+ images/s by arithmetic", result.stdout, re.M)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contenders baselin", "invalid choice: 'baselin'"),
        ("--set epoch=8", "expected a setting of our loop alone and its value, as epochs=8, got 'epoch=8'"),
        ("--set batch-size=64", "expected a setting of our loop alone and its value, as epochs=8, got 'batch-size=64'"),
        ("--images 100", "--images 100: less than --batch-size 128"),
        ("--turns 0", "from 1 to 1,000,000, got '0'"),
    ],
)
def test_a_bad_flag_of_the_throughput_benchmark_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        throughput.parse(flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_loop_that_a_user_would_write_has_the_same_network():
    plain = throughput.Plain(throughput.parse(["--images", "4", "--batch-size", "2"]))
    images = torch.zeros(2, 3, 32, 32)
    assert plain.network.eval()(images).shape == MobileNetV4().eval()(images).shape == (2, 10)
    assert count_parameters(plain.network) == count_parameters(MobileNetV4())


def test_a_contender_of_the_throughput_benchmark_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(throughput.sys, "executable", shutil.which("false"))
    result = run_here(throughput.main, "--contenders", "baseline")
    assert (result.returncode, result.stderr) == (1, "error: baseline: failed\n")


def test_each_lever_of_the_throughput_benchmark_is_one_that_the_loop_has():
    fields = Config().recipe()
    for lever in throughput.LEVERS.values():
        if isinstance(lever, dict):
            assert lever.keys() <= fields.keys()
        else:
            for owner, name, replacement in lever:
                assert callable(replacement) == callable(vars(owner)[name])


# ---- Time to an accuracy -------------------------------------------------------------------------------------------


def test_airbench94_has_the_published_size_and_whitens_patches():
    network = time_to_accuracy.airbench94()
    assert count_parameters(network) == 1_972_792  # those of the published network, its frozen ones included
    images = torch.randn(64, 3, 8, 8).cumsum(-1)
    time_to_accuracy.whiten(network[0], images)
    outputs = nn.functional.conv2d(images, network[0].weight).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:12], -outputs[12:], atol=1e-4)
    assert torch.allclose(outputs[:12] @ outputs[:12].T / outputs.shape[1], torch.eye(12), atol=0.02)


def test_airbench94_learns_drawn_shapes_and_is_evaluated_in_three_ways():
    config = Config(epochs=2, batch_size=256, crop_padding=2, cutout=0, cutmix=0.0, precision="fp32", synthetic=True)
    data = load_data(config, torch.device("cpu"))
    torch.manual_seed(0)
    network = time_to_accuracy.airbench94()
    time_to_accuracy.whiten(network[0], data.train_images[:500].permute(0, 3, 1, 2) / 255 - 0.5)
    frozen = [parameter.clone() for parameter in network.parameters() if not parameter.requires_grad]
    time_to_accuracy.train_airbench94(network, data, config)
    still = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    assert all(map(torch.equal, frozen, still)) and len(frozen) == 7
    trained = Trained(Path("airbench94"), network, {}, config, torch.device("cpu"))
    assert min(time_to_accuracy.accuracies(trained, data)) > 50  # of ten kinds of shapes


def test_a_contender_without_a_length_is_refused():
    for contender in ("baseline", "enhanced:0", "airbench"):
        result = run_here(time_to_accuracy.main, "airbench94", contender)
        assert result.returncode == 2
        assert result.stderr.endswith(f"error: {contender}: expected airbench94, baseline:EPOCHS or enhanced:EPOCHS\n")


# ---- MPS -----------------------------------------------------------------------------------------------------------


def test_the_check_of_mps_prints_differences_times_and_what_failed(monkeypatch):
    monkeypatch.setattr(devices, "can_compile", lambda _: False)
    monkeypatch.setitem(mps_check.SETTINGS, "eager bf16", mps_check.SETTINGS["eager fp32"])  # slow on some CPUs
    result = run_here(mps_check.main, "--device", "cpu", "--steps", "1", "--batch-size", "4")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0] == lines[-1] == "```"
    assert f"torch {torch.__version__}, cpu" in lines[1]
    for variant in BUILDERS:
        assert any(line.startswith(f"{variant}, gradients: largest relative difference 0.0e+00 (") for line in lines)
        for precision in ("fp32", "bf16"):
            assert re.search(rf"^{variant}, eager {precision}, batch 4: [\d.]+ ms a step$", result.stdout, re.M)
        assert f"{variant}, compiled fp32, batch 4: failed: RuntimeError: torch.compile does not work here" in lines


def test_the_check_of_mps_finds_wrong_gradients(monkeypatch):
    right, places = common.F.cross_entropy, [torch.device("cpu"), torch.device("cpu")]
    factors = iter((1.0, 1.01))
    monkeypatch.setattr(common.F, "cross_entropy", lambda *a, **k: next(factors) * right(*a, **k))
    config = Config(batch_size=4, precision="fp32", compile="off", cutout=0)
    found = mps_check.largest_difference(lambda num_classes: Tiny(num_classes), config, places[0])
    assert re.match(r"largest relative difference 9\.9e-03 \(", found) or "1.0e-02" in found


# ---- Ablation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reference"), [("baseline", MobileNetV4), ("all", enhanced_mobilenetv4)])
def test_no_idea_is_the_baseline_and_all_are_the_enhanced_network(name, reference, monkeypatch):
    built = []
    monkeypatch.setattr(common, "main", lambda _, build, arguments: built.append(build(10, **arguments(Config()))))
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
    monkeypatch.setattr(common, "main", lambda _, build, arguments: built.append(build(10, **arguments(Config()))))
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


@pytest.mark.parametrize("flags", [("--seed", "1"), ("--output-dir", "elsewhere")])
def test_the_ablation_refuses_a_seed_and_a_folder_for_all_runs(flags, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="each run has its own"):
        run_ablation(monkeypatch, tmp_path, *flags)


def test_a_run_of_the_ablation_is_a_training_like_any_other(monkeypatch, folders, tmp_path):
    def run(command):
        assert command[:3] == [sys.executable, "-m", "benchmarks.ablation"]
        return run_here(ablation.main, *command[3:])

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    flags = ["--data-dir", str(folders), "--epochs", "1", "--batch-size", "20", "--image-size", "16", "--threads", "1"]
    row = ablation.measure("silu", 1, flags, tmp_path)
    assert row["parameters"] == 3_056_370 - 7 * 1281  # three classes
    accuracies = json.loads((tmp_path / "silu-1" / "summary.json").read_text())["test_accuracy"]
    assert [float(row[key]) for key in ("accuracy", "raw", "with_flip")] == pytest.approx(
        [accuracies[key] for key in ("averaged", "raw", "averaged_tta")], abs=0.006
    )
    saved = checkpoint.load(tmp_path / "silu-1" / "checkpoint.pt")
    assert saved["network"]["silu"] is True
    assert saved["recipe"]["seed"] == 1
    with pytest.raises(RunError, match="silu with seed 1: training ended with status 1"):
        ablation.measure("silu", 1, [*flags, "--learning-rate", "0.01"], tmp_path)


# ---- Shifts --------------------------------------------------------------------------------------------------------


def test_shifts_move_the_content_and_reflect_at_the_borders():
    images = torch.from_numpy(random_images(3, 1))
    for down, right in ((0, 0), (2, 0), (-2, 0), (0, 2), (2, -2)):
        padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), [2] * 4, mode="reflect")
        expected = padded[:, :, 2 - down : 34 - down, 2 - right : 34 - right].permute(0, 2, 3, 1)
        assert torch.equal(shifts.shift(images, down, right).float(), expected)


def test_the_accuracy_of_shifted_images_is_printed_for_every_direction(monkeypatch, folders, tmp_path):
    monkeypatch.setitem(BUILDERS, "tiny", Tiny)
    place = tmp_path / "run"
    flags = ["--epochs", 1, "--batch-size", 16, "--holdout", 12, "--output-dir", place]
    assert run_tiny("--data-dir", folders, *flags).returncode == 0
    path = place / "checkpoint.pt"
    result = run_here(shifts.main, path, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("holdout: 12 images (pictures in ")
    found = [float(value) for value in re.findall(r"right +(\d+\.\d\d)%$", result.stdout, re.M)]
    assert len(found) == 9
    mean, lowest = map(float, re.findall(r"mean of the eight (.+)%, lowest (.+)%", result.stdout)[0])
    assert mean == pytest.approx(sum(found[1:]) / 8, abs=0.011)
    assert lowest == min(found[1:])
    tested = run_here(shifts.main, path, "--device", "cpu", "--test-set")
    assert tested.stdout.startswith("test: 7 images (")
    other = write_folders(tmp_path / "other", classes=[*CLASSES, "truck"])
    refused = run_here(shifts.main, path, "--device", "cpu", "--data-dir", other)
    assert refused.returncode == 1
    assert "its classes are" in refused.stderr and refused.stderr.count("\n") == 1
