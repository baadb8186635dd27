"""The tools on a small trained network: each number against another way of computing it."""

import argparse
import csv
import functools
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CLASSES, CPU, REPOSITORY, flags, random_images, run_here, run_script_here, write_folders
from PIL import Image

import common
import tools
import training.data
from benchmarks.throughput import peak_memory
from mobilenetv4_baseline import MobileNetV4
from tools import evaluate, export, plot, predict
from training import checkpoint
from training.augmentation import augment, draw_epoch
from training.config import Config, RunError
from training.data import load_data
from training.pictures import SHAPES, decode, draw_shapes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of the enhanced network and the folder of its pictures."""
    root = tmp_path_factory.mktemp("tools")
    folders = write_folders(root / "pictures", test=30)
    result = run_script_here("enhanced", *flags(folders, root / "run", 2), "--cutmix", 0.5, "--batch-size", 36)
    assert result.returncode == 0, result.stderr
    return root / "run", folders


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a tool as `python -m tools.NAME` does, but in this process."""
    return run_here(importlib.import_module(f"tools.{name}").main, *arguments)


def write_changed(run, target, **changes):
    """Write the checkpoint of a run with other values under some keys."""
    saved = checkpoint.load(run / "checkpoint.pt")
    del saved["sha256"]
    checkpoint.write(target, saved | changes)
    return target


@pytest.fixture
def tuning(trained, tmp_path):
    """Return a run like the trained one, but one that held 6 training images out."""
    run, folders = trained
    shutil.copytree(run, tmp_path / "tuning")
    data = load_data(Config(data_dir=folders, holdout=6), CPU)
    recipe = checkpoint.load(run / "checkpoint.pt")["recipe"] | {"holdout": 6}
    write_changed(run, tmp_path / "tuning" / "checkpoint.pt", recipe=recipe, data=data.fingerprint)
    return tmp_path / "tuning"


def test_help_opens_with_the_command_and_ctrl_c_leaves_no_traceback(trained, monkeypatch):
    for name in ("evaluate", "predict", "export", "plot"):
        assert f"python -m tools.{name}" in run_tool(name, "--help").stdout[:400]

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_network", interrupted)
    result = run_tool("evaluate", trained[0] / "checkpoint.pt")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


# ---- Loading -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_variant_or_without_raw_weights_is_refused(trained, tmp_path):
    saved = checkpoint.load(trained[0] / "checkpoint.pt")
    other = write_changed(trained[0], tmp_path / "a.pt", variant="other")
    with pytest.raises(RunError, match=r"a\.pt: .*its variant is other, known are baseline, enhanced"):
        tools.load_network(other)
    export.write_weights(tools.load_network(trained[0] / "checkpoint.pt"), tmp_path / "b.pt")
    with pytest.raises(RunError, match=r"b\.pt: .*it holds no raw weights"):
        tools.load_network(tmp_path / "b.pt", weights="raw")
    network = tools.load_network(tmp_path / "b.pt").network
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, saved["averaged"][name].float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "network",
    [{"width": 12.0}, {"width": 1e30}, {"strides": [1, 2]}, {"activation": "SiLU"}, {"num_classes": 3}, {"depth": 3}],
    ids=str,
)
def test_odd_arguments_of_the_network_are_refused_without_filling_the_memory(trained, tmp_path, network):
    arguments = checkpoint.load(trained[0] / "checkpoint.pt")["network"]
    forged = write_changed(trained[0], tmp_path / "forged.pt", network=arguments | network)
    before = peak_memory()
    for refused in (run_tool("evaluate", forged), run_tool("export", forged, tmp_path / "net.pt")):
        assert refused.stderr.startswith(f"error: {forged}: not a usable checkpoint (")
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert not peak_memory() - before > 400e6  # 12 times the width takes 1.6 GB; not a number on Windows
    assert list(tmp_path.iterdir()) == [forged]


@pytest.mark.parametrize("recipe", [{"epochs": "many"}, {"flip": "twice"}, {"holdout": -1}, {"cutout": [8]}], ids=str)
def test_odd_settings_are_refused(trained, tmp_path, recipe):
    settings = checkpoint.load(trained[0] / "checkpoint.pt")["recipe"]
    forged = write_changed(trained[0], tmp_path / "forged.pt", recipe=settings | recipe)
    with pytest.raises(RunError, match=r"forged\.pt: not a usable checkpoint"):
        tools.load_network(forged)


def test_a_mistake_of_our_own_is_not_blamed_on_the_checkpoint(trained, monkeypatch):
    def wrong(device):
        raise TypeError("a mistake")

    monkeypatch.setattr(tools.trained.devices, "memory_format", wrong)
    with pytest.raises(TypeError, match="a mistake"):
        tools.load_network(trained[0] / "checkpoint.pt")


@pytest.mark.parametrize("variant", ["baseline", "enhanced"])
def test_the_published_weights_load_with_the_settings_of_their_run(variant):
    trained = tools.load_network(REPOSITORY / "results" / "weights" / f"{variant}.pt")
    assert trained.saved["variant"] == variant and trained.saved["classes"] == tools.trained.CIFAR10_CLASSES
    summary = REPOSITORY / "results" / "cpu-45-epochs-eighth" / f"{variant}-0" / "summary.json"
    then = json.loads(summary.read_text())["configuration"]
    settings = trained.config.recipe()
    del settings["precision"]  # that of this machine
    assert settings == {name: then[name] for name in settings}
    images = torch.from_numpy(random_images(2, 0))
    assert tools.logits_of(images, trained).isfinite().all()


def test_without_the_optional_packages_each_tool_does_what_it_can_and_names_what_to_install(trained, tmp_path):
    """Also that importing the networks and the tools prints nothing and changes no state of PyTorch."""
    script = """
import os, sys, torch
for name in ("onnx", "onnxscript", "onnxruntime", "matplotlib"):
    sys.modules[name] = None
def state(): return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)
before = state()
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from tools import evaluate, export, plot, predict
assert state() == before
checkpoint, picture, onnx = sys.argv[1:]
for tool, *flags in ((predict, checkpoint, picture), (export, checkpoint, onnx), (plot, os.path.dirname(checkpoint))):
    sys.argv = ["tool", *flags]
    try:
        tool.main()
    except SystemExit as end:
        print(end.code)
"""
    run, folders = trained
    picture = next((folders / "test" / "cat").iterdir())
    command = [sys.executable, "-c", script, run / "checkpoint.pt", picture, tmp_path / "net.onnx"]
    result = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    predicted, status, exported, plotted = result.stdout.splitlines()
    assert predicted.startswith(f"{picture}: ") and status == "0"
    assert exported.endswith("pip install onnx onnxruntime onnxscript")
    assert plotted.endswith("pip install matplotlib")
    assert not (tmp_path / "net.onnx").exists()


# ---- Evaluate ------------------------------------------------------------------------------------------------------


def test_evaluation_repeats_the_accuracies_of_the_run(trained):
    run, folders = trained
    summary = json.loads((run / "summary.json").read_text())
    for flag, weights in (("raw", "raw"), ("ema", "averaged")):
        for flip in ("", "_tta"):
            options = ["--weights", flag, "--json"] + ["--tta"] * bool(flip)
            result = run_tool("evaluate", run / "checkpoint.pt", *options)
            assert result.returncode == 0, result.stderr
            found = json.loads(result.stdout)
            assert found["top1"] == pytest.approx(summary["test_accuracy"][weights + flip])
            assert (found["split"], found["own"], found["images"]) == ("test", True, 30)
            if weights == "averaged" and not flip:
                assert found["loss"] == pytest.approx(summary["test_loss"][weights])
                assert found["confusion_matrix"] == summary["confusion_matrix"]
                assert {name: row["recall"] for name, row in found["classes"].items()} == pytest.approx(
                    summary["per_class_accuracy"]
                )
    table = run_tool("evaluate", run / "checkpoint.pt", "--data-dir", folders).stdout
    assert f"top-1 accuracy     {summary['test_accuracy']['averaged']:6.2f}%" in table
    assert table.startswith(f"test: 30 images, the run's own (pictures in {folders})\nEMA weights\n")
    assert "top-5" not in table  # of three classes
    assert all(name in table for name in CLASSES)


def test_a_folder_of_some_classes_is_evaluated_with_the_labels_of_the_network(trained, tmp_path):
    run, folders = trained
    some = tmp_path / "some"
    for name in CLASSES[1:]:
        shutil.copytree(folders / "test" / name, some / name)
    found, whole = (
        json.loads(run_tool("evaluate", run / "checkpoint.pt", "--data-dir", folder, "--json").stdout)
        for folder in (some, folders)
    )
    assert (found["split"], found["own"], found["images"]) == ("pictures", False, 20)
    assert found["confusion_matrix"] == [[0, 0, 0], *whole["confusion_matrix"][1:]]
    assert found["classes"]["cat"]["recall"] is None
    table = run_tool("evaluate", run / "checkpoint.pt", "--data-dir", some).stdout
    assert re.search(r"^cat +0 +- ", table, re.M)
    refused = run_tool("export", run / "checkpoint.pt", tmp_path / "net.onnx", "--int8", "--data-dir", some)
    assert refused.stderr == f"error: --int8: no training images in {some}; expected train/ and test/\n"
    (some / "truck").mkdir()
    empty = run_tool("evaluate", run / "checkpoint.pt", "--data-dir", some)
    assert empty.stderr.startswith(f"error: {some}: ") and "truck" in empty.stderr and empty.stderr.count("\n") == 1
    Image.new("RGB", (32, 32)).save(some / "truck" / "one.png")
    refused = run_tool("evaluate", run / "checkpoint.pt", "--data-dir", some)
    assert refused.stderr == f"error: {some}: the network has no class truck\n"


def test_a_class_called_train_is_not_taken_for_a_bare_folder_of_classes(trained, tmp_path):
    folders = write_folders(tmp_path / "vehicles", classes=["boat", "train"])
    vehicles = tools.load_network(trained[0] / "checkpoint.pt")
    vehicles = replace(vehicles, saved=vehicles.saved | {"classes": ["boat", "train"]})
    data, _ = tools.load_images(vehicles, folders)
    assert (len(data.train_images), len(data.test_images)) == (40, 7)


def test_a_run_that_held_images_out_is_evaluated_on_them_and_on_the_test_set_only_when_asked(trained, tuning, tmp_path):
    run, folders = trained
    network = tools.load_network(run / "checkpoint.pt")
    for options, holdout, split, own, count in (([], 6, "holdout", True, 6), (["--test-set"], 0, "test", None, 30)):
        found = json.loads(run_tool("evaluate", tuning / "checkpoint.pt", "--json", *options).stdout)
        assert (found["split"], found["own"], found["images"]) == (split, own, count)
        data = load_data(Config(data_dir=folders, holdout=holdout), CPU)
        logits = tools.logits_of(data.test_images, network)
        assert found["loss"] == pytest.approx(common.score(logits, data.test_labels)["loss"], rel=1e-4)
    table = run_tool("evaluate", tuning / "checkpoint.pt", "--test-set").stdout
    assert table.startswith("test: 30 images (")
    table = run_tool("evaluate", tuning / "checkpoint.pt").stdout
    assert table.startswith("holdout: 6 images, the run's own (") and "6 training images held out" in table
    others = write_folders(tmp_path / "others", train=41)
    table = run_tool("evaluate", tuning / "checkpoint.pt", "--data-dir", others).stdout
    assert table.startswith("holdout: 6 images, not those of the run, or in another order (")
    exported = run_tool("export", tuning / "checkpoint.pt", tmp_path / "net.pt2", "--data-dir", folders).stdout
    assert exported.split()[:2] == ["holdout", "accuracy"]


def test_images_are_looked_for_where_the_run_had_them_or_else_in_data(trained, tmp_path, monkeypatch):
    run, folders = trained
    monkeypatch.chdir(tmp_path)
    alone = write_changed(run, tmp_path / "alone.pt")
    nothing = run_tool("evaluate", alone)
    assert nothing.stderr.startswith("error: data: holds neither train/ and test/ nor")
    (tmp_path / "data").symlink_to(folders)
    assert json.loads(run_tool("evaluate", alone, "--json").stdout)["own"]
    (tmp_path / "summary.json").write_text("[]")
    damaged = run_tool("evaluate", alone)
    assert damaged.stderr.startswith(f"error: {tmp_path / 'summary.json'}: not a usable summary (")
    assert run_tool("evaluate", alone, "--data-dir", folders).returncode == 0


@pytest.mark.parametrize("with_summary", [True, False])
def test_a_network_of_drawn_shapes_is_evaluated_on_them(trained, tmp_path, monkeypatch, with_summary):
    monkeypatch.setattr(training.data, "draw_shapes", functools.partial(draw_shapes, train=100, test=50))
    data = load_data(Config(synthetic=True), CPU)
    about = dict(variant="baseline", network={}, classes=list(SHAPES), data=data.fingerprint)
    weights = dict(MobileNetV4(10).state_dict())
    file = write_changed(trained[0], tmp_path / "checkpoint.pt", **about, averaged=weights, model={})
    if with_summary:
        (tmp_path / "summary.json").write_text(json.dumps({"configuration": {"synthetic": True, "data_dir": "data"}}))
    found = json.loads(run_tool("evaluate", file, "--json").stdout)
    assert (found["data"], found["own"], found["images"]) == ("drawn shapes", True, 50)
    pictures = run_tool("evaluate", file, "--data-dir", trained[1])
    assert "its classes are cat, dog, ship, the network's are checkerboard, circle" in pictures.stderr


def test_flip_averaging_is_refused_where_the_training_did_without_flips(trained, tmp_path):
    recipe = checkpoint.load(trained[0] / "checkpoint.pt")["recipe"] | {"flip": "none"}
    file = write_changed(trained[0], tmp_path / "digits.pt", recipe=recipe)
    result = run_tool("evaluate", file, "--data-dir", trained[1], "--tta")
    assert result.returncode == 1 and "--flip none" in result.stderr and result.stderr.count("\n") == 1
    assert run_tool("evaluate", file, "--data-dir", trained[1]).returncode == 0


def test_names_of_classes_are_escaped_in_tables_and_raw_in_json(trained, tmp_path):
    classes = ["a\nb", "c\x1b[1m", "d\udcff"]
    file = write_changed(trained[0], tmp_path / "odd.pt", classes=classes)
    folders = write_folders(tmp_path / "odd", classes=classes)
    shown = ["a\\nb", "c\\x1b[1m", "d\\udcff"]
    table = run_tool("evaluate", file, "--data-dir", folders).stdout
    assert all(re.search(rf"^{re.escape(name)} ", table, re.M) for name in shown)
    assert list(json.loads(run_tool("evaluate", file, "--data-dir", folders, "--json").stdout)["classes"]) == classes
    picture = next((folders / "test" / classes[0]).iterdir())
    line = run_tool("predict", file, picture).stdout
    assert line.count("\n") == 1 and all(name in line for name in shown)
    row = json.loads(run_tool("predict", file, picture, "--json").stdout)
    assert row["image"] == str(picture) and list(row["probabilities"]) == classes
    assert run_tool("export", file, tmp_path / "odd.onnx").returncode == 0
    (onnx,) = tools.optional("onnx")
    model = onnx.load(tmp_path / "odd.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"]) == classes


def test_measures_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(400, 7, generator=generator), torch.randint(0, 7, (400,), generator=generator)
    found = evaluate.measure(logits, labels, list("abcdefg"))
    order = logits.argsort(1, descending=True)
    assert found["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert found["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).double().sum().item() / 400)
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    assert found["loss"] == pytest.approx(-probabilities[torch.arange(400), labels].log().mean().item(), rel=1e-5)
    confidence, predicted = probabilities.max(1)
    gap = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            gap += inside.double().mean() * abs(right - confidence[inside].double().mean())
    assert found["calibration_error"] == pytest.approx(100 * gap.item(), rel=1e-4)
    for index, name in enumerate("abcdefg"):
        hits = ((predicted == index) & (labels == index)).sum().item()
        assert found["classes"][name]["recall"] == pytest.approx(100 * hits / (labels == index).sum().item())
        assert found["classes"][name]["precision"] == pytest.approx(100 * hits / (predicted == index).sum().item())
        assert found["confusion_matrix"][index][index] == hits
    assert np.sum(found["confusion_matrix"]) == 400
    many = evaluate.measure(torch.eye(301), torch.arange(301), [str(index) for index in range(301)])
    text = evaluate.report(many | {"split": "test", "own": True, "data": "", "weights": "raw", "tta": False})
    assert text.endswith("\nconfusion matrix left out: 301 classes")


def test_perfect_and_hopeless_confidence_have_the_calibration_errors_that_they_must():
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert evaluate.calibration_error(sure, torch.tensor([0, 1])) == 0
    assert evaluate.calibration_error(sure, torch.tensor([1, 0])) == 100
    edge = torch.tensor(
        [[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]
    )  # both in the first of two intervals, which is closed above
    assert evaluate.calibration_error(edge, torch.tensor([0, 1]), bins=2) == pytest.approx(5)
    apart = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.2, 0.2]])
    assert evaluate.calibration_error(apart, torch.tensor([0, 1]), bins=2) == pytest.approx(55)


def test_cifar10_is_not_downloaded_for_a_network_of_other_classes(trained, tmp_path):
    result = run_tool("evaluate", trained[0] / "checkpoint.pt", "--data-dir", tmp_path / "nowhere")
    assert result.returncode == 1
    assert result.stderr == f"error: --data-dir {tmp_path / 'nowhere'}: not a folder\n"
    (tmp_path / "nothing").mkdir()
    result = run_tool("evaluate", trained[0] / "checkpoint.pt", "--data-dir", tmp_path / "nothing")
    assert result.stderr.startswith(f"error: {tmp_path / 'nothing'}: holds neither train/ and test/ nor a folder of")
    assert list(tmp_path.rglob("*")) == [tmp_path / "nothing"]


def test_other_classes_are_refused_by_name(trained, tmp_path):
    other = write_folders(tmp_path / "other", classes=["cat", "dog", "truck"])
    result = run_tool("evaluate", trained[0] / "checkpoint.pt", "--data-dir", other)
    assert result.returncode == 1
    assert "its classes are cat, dog, truck, the network's are cat, dog, ship" in result.stderr
    assert result.stderr.count("\n") == 1


# ---- Predict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 16])
def test_pictures_of_any_size_and_mode_are_predicted_as_in_training(size, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 4)
    run, folders = trained
    recipe = checkpoint.load(run / "checkpoint.pt")["recipe"] | {"image_size": size}
    file = write_changed(run, tmp_path / "network.pt", image_size=size, recipe=recipe)
    pixels = random_images(1, 5)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).resize((320, 320), Image.Resampling.NEAREST).convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "c.jpg", quality=100)
    result = run_tool("predict", file, tmp_path, folders / "test" / "dog", "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3 + 10
    assert [row["image"] for row in rows[:3]] == [str(tmp_path / name) for name in ("a.png", "b.png", "c.jpg")]
    images = decode([row["image"] for row in rows], size)
    assert images.shape == (13, size, size, 3) and (size < 32 or (images[0] == pixels).all())
    expected = tools.logits_of(torch.from_numpy(images), tools.load_network(file)).softmax(1)
    found = torch.tensor([[row["probabilities"][name] for name in CLASSES] for row in rows])
    assert torch.allclose(found, expected, atol=2e-3)
    assert found.sum(1).tolist() == pytest.approx([1] * 13, abs=1e-4)
    alone = run_tool("predict", file, tmp_path / "a.png", "--top", 2).stdout
    assert alone.startswith(f"{tmp_path / 'a.png'}: ") and alone.count("\n") == 1
    printed = re.findall(r"(\w+) (\d+\.\d)%", alone)
    best = sorted(rows[0]["probabilities"].items(), key=lambda item: -item[1])[:2]
    assert [name for name, _ in printed] == [name for name, _ in best]
    assert [float(value) for _, value in printed] == pytest.approx([100 * value for _, value in best], abs=0.3)


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(trained, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = [tmp_path / name for name in ("bad.png", "good.png", "missing.png", "pipe.png")]
    os.mkfifo(names[3])  # which reading would wait for
    result = run_tool("predict", trained[0] / "checkpoint.pt", *names)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{tmp_path / 'good.png'}: ") and result.stdout.count("\n") == 1
    named = [line.split(":")[1].strip() for line in result.stderr.splitlines()]
    assert named == [str(names[index]) for index in (0, 2, 3)]
    (tmp_path / "empty").mkdir()
    nothing = run_tool("predict", trained[0] / "checkpoint.pt", tmp_path / "empty")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith(f"error: {tmp_path / 'empty'}: no picture in this folder")
    both = run_tool("predict", trained[0] / "checkpoint.pt", tmp_path / "empty", names[1])
    assert both.returncode == 1 and both.stderr == nothing.stderr
    assert both.stdout == result.stdout


def test_in_folders_the_endings_of_training_are_taken_and_a_notice_names_others(trained, tmp_path):
    pictures = tmp_path / "line\nbreak"
    for name, kind in (("a.JFIF", "JPEG"), ("b.gif", "GIF"), ("below/c.webp", "WEBP")):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(pictures / name, kind)
    (pictures / "notes.txt").write_text("no picture")
    result = run_tool("predict", trained[0] / "checkpoint.pt", pictures, "--json")
    assert result.returncode == 0
    found = [json.loads(line)["image"] for line in result.stdout.splitlines()]
    assert found == [str(pictures / name) for name in ("a.JFIF", "b.gif", "below/c.webp")]
    assert result.stderr.startswith("notice: ") and ".txt" in result.stderr and result.stderr.count("\n") == 1
    lines = run_tool("predict", trained[0] / "checkpoint.pt", pictures).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [name.replace("\n", "\\n") for name in found]


# ---- Export --------------------------------------------------------------------------------------------------------


def test_folding_changes_no_logits_and_leaves_only_plain_convolutions(trained):
    loaded = tools.load_network(trained[0] / "checkpoint.pt")
    network, saved, deployed = loaded.network, loaded.saved, export.Deployed(loaded)
    kinds = {type(module) for module in deployed.network.modules()}
    assert not any(issubclass(kind, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d) for kind in kinds)
    assert {kind for kind in kinds if issubclass(kind, torch.nn.Conv2d)} == {torch.nn.Conv2d}
    images = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(saved[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(deployed(images), network((images - mean) / std), atol=1e-4)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_is_exported_gives_the_logits_of_the_network_for_any_number_of_images(trained, tmp_path, suffix):
    run, folders = trained
    file = tmp_path / f"net{suffix}"
    result = run_tool("export", run / "checkpoint.pt", file, "--data-dir", folders)
    assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    row = next(line for line in result.stdout.splitlines() if line.startswith("float32"))
    accuracy = float(row.split()[1].rstrip("%"))
    assert accuracy == pytest.approx(summary["test_accuracy"]["averaged"], abs=100 / 30 + 0.01)  # bf16 or float32
    assert list(tmp_path.iterdir()) == [file]
    loaded = tools.load_network(run / "checkpoint.pt")
    mean, std = (torch.tensor(loaded.saved[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    run_file = export.FORMATS[suffix][1](file.read_bytes())
    for count in (1, 2, 7):
        images = torch.rand(count, 3, 32, 32)
        with torch.no_grad():
            expected = loaded.network((images - mean) / std)
        assert np.allclose(run_file(images.numpy()), expected.numpy(), atol=1e-3)


def test_int8_is_close_to_float_and_a_quarter_of_its_size(trained, tmp_path):
    run, _ = trained
    result = run_tool("export", run / "checkpoint.pt", tmp_path / "net.onnx", "--int8")  # on the run's own images
    assert result.returncode == 0, result.stderr
    small, large = tmp_path / "net.int8.onnx", tmp_path / "net.onnx"
    assert small.stat().st_size < 0.4 * large.stat().st_size
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["float32", "int8"]
    assert all(row[1].endswith("%") for row in rows)
    images = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
    expected, found = (export.run_onnx(file.read_bytes())(images) for file in (large, small))
    assert np.abs(found - expected).max() < 0.25 * np.abs(expected).max()


def test_an_export_that_differs_is_refused_and_leaves_nothing(trained, tmp_path, monkeypatch):
    def wrong(network):
        network.classifier.bias.data.add_(1)
        return network.requires_grad_(False)

    monkeypatch.setattr(export, "fold", wrong)
    options = argparse.Namespace(
        checkpoint=trained[0] / "checkpoint.pt", file=tmp_path / "net.pt2", int8=False, data_dir=None
    )
    with pytest.raises(RunError, match=r"net\.pt2: its logits differ"):
        export.export(options)
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_and_flags_of_other_formats_are_refused(trained, tmp_path):
    result = run_tool("export", trained[0] / "checkpoint.pt", tmp_path / "net.tflite")
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path / 'net.tflite'}: expected a name that ends in .onnx, .pt2 or .pt\n"
    result = run_tool("export", trained[0] / "checkpoint.pt", tmp_path / "net.pt2", "--int8")
    assert result.stderr == "error: --int8: only for .onnx\n"
    result = run_tool("export", trained[0] / "checkpoint.pt", tmp_path / "net.pt", "--data-dir", tmp_path)
    assert result.stderr.startswith("error: --data-dir: only for .onnx and .pt2")
    (tmp_path / "file").touch()
    result = run_tool("export", trained[0] / "checkpoint.pt", tmp_path / "file" / "net.pt")
    assert result.returncode == 1 and result.stderr.startswith(f"error: {tmp_path / 'file'}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_checkpoint_of_a_run_is_written_over(trained, tmp_path):
    own = trained[0] / "checkpoint.pt"
    copy = shutil.copy(own, tmp_path / "kept.pt")  # a run resumes from it once it is renamed
    busy = tmp_path / "checkpoint.previous.pt"  # of a run, damaged
    busy.write_bytes(b"damaged")
    (tmp_path / ".lock").touch()
    weights = tmp_path / "weights.pt"
    for _ in range(2):  # a new file, then a file of weights alone
        assert run_tool("export", own, weights).returncode == 0
    for source, target in ((own, own), (own, copy), (own, busy), (own, tmp_path / "checkpoint.pt"), (weights, weights)):
        before = target.read_bytes() if target.exists() else None
        result = run_tool("export", source, target)
        assert result.stderr == f"error: {target}: this would replace a checkpoint; choose another name\n"
        assert (target.read_bytes() if target.exists() else None) == before


def test_an_export_is_written_beside_links_and_files_of_the_user_not_through_them(trained, tmp_path):
    mine, victim = tmp_path / "net.tmp.pt2", tmp_path / "victim"
    for file in (mine, victim):
        file.write_text("mine")
    (tmp_path / "net.pt2.tmp").symlink_to(victim)
    assert run_tool("export", trained[0] / "checkpoint.pt", tmp_path / "net.pt2").returncode == 0
    assert mine.read_text() == victim.read_text() == "mine"
    assert not (tmp_path / "net.pt2").is_symlink()


# ---- Plot ----------------------------------------------------------------------------------------------------------


def test_all_pictures_of_a_run_are_drawn(trained, tmp_path):
    run, _ = trained
    result = run_tool("plot", run, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    names = ["curves.png", "confusion.png", "mistakes.png", "samples.png"]
    assert result.stdout.splitlines() == [str(tmp_path / name) for name in names]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # not blank
    other = write_folders(tmp_path / "other")
    refused = run_tool("plot", run, "--data-dir", other, "--output-dir", tmp_path)
    assert refused.returncode == 1
    assert f"{other}: not the images that {run} was trained on" in refused.stderr
    copy = shutil.copytree(run, tmp_path / "many classes")
    summary = json.loads((run / "summary.json").read_text())
    del summary["confusion_matrix"]
    (copy / "summary.json").write_text(json.dumps(summary))
    drawn = run_tool("plot", copy)
    assert drawn.returncode == 0 and not (copy / "confusion.png").exists()
    assert "confusion.png is left out: " in drawn.stdout


def test_samples_are_the_images_that_the_network_is_trained_on(trained, tmp_path, monkeypatch):
    run, folders = trained
    seen = {}
    monkeypatch.setattr(
        plot, "draw_grid", lambda images, titles, file, plt: (file.touch(), seen.update({file.name: (images, titles)}))
    )
    monkeypatch.setattr(plot, "draw_confusion", lambda *arguments: None)
    assert len(list(plot.draw_all(run, tmp_path, folders, None))) == 3
    config = Config(data_dir=folders, cutmix=0.5, batch_size=36, epochs=2)
    data = load_data(config, CPU)
    drawn = draw_epoch(40, config, 1, CPU)
    images, shares = (part[:32] for part in augment(data, drawn, slice(0, 36), config))
    assert torch.equal(seen["samples.png"][0], images)
    for title, row in zip(seen["samples.png"][1], shares, strict=True):
        assert title.split("\n")[0].split(" ")[0] == data.classes[row.argmax()]


@pytest.fixture
def pyplot():
    matplotlib, pyplot = tools.optional("matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    yield pyplot
    pyplot.close("all")


def test_the_curves_of_several_runs_are_their_metrics_and_can_be_told_apart(trained, tmp_path, pyplot):
    text = (trained[0] / "metrics.csv").read_text()
    rows, names = list(csv.DictReader(io.StringIO(text))), ["line\nbreak", "other"]
    for name, kind in zip(names, ("test", "holdout"), strict=True):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "metrics.csv").write_text(text.replace("test_", f"{kind}_"))
    result = run_tool("plot", *(tmp_path / name / "run" for name in names), "--output-dir", tmp_path)
    assert result.stdout == f"{tmp_path / 'curves.png'}\n"
    axes = pyplot.gcf().axes
    for axis, column in zip(axes, ("loss", "test_loss", "test_accuracy"), strict=True):
        for line in axis.lines:
            assert list(line.get_xdata()) == [1, 2]
            assert list(line.get_ydata()) == [float(row[column]) for row in rows]
        assert len({line.get_color() for line in axis.lines}) == len({line.get_linestyle() for line in axis.lines}) == 2
    legend = [entry.get_text() for entry in axes[-1].get_legend().get_texts()]
    assert legend == [os.path.join("line\\nbreak", "run"), os.path.join("other", "run") + " (held out)"]


def test_the_curves_of_older_runs_are_drawn(tmp_path, pyplot):
    runs = [REPOSITORY / "results" / "cpu-45-epochs" / variant for variant in ("baseline", "enhanced")]
    result = run_tool("plot", *runs, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    axes = pyplot.gcf().axes
    assert [axis.get_ylabel() for axis in axes] == ["training loss", "accuracy (%)"]
    for run, line in zip(runs, axes[1].lines, strict=True):
        accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]["averaged"]
        assert line.get_ydata()[-1] == pytest.approx(accuracy, abs=0.01)


def test_what_is_no_run_or_a_damaged_one_is_named(trained, tmp_path):
    nothing = run_tool("plot", tmp_path)
    assert nothing.returncode == 1
    assert nothing.stderr == f"error: {tmp_path / 'metrics.csv'}: no epochs there; expected the folder of a run\n"
    copy = shutil.copytree(trained[0], tmp_path / "copy")
    for damaged in ("{", '{"per_class_accuracy": {"a": 1}, "confusion_matrix": [[1, 2], [3]]}'):
        (copy / "summary.json").write_text(damaged)
        result = run_tool("plot", copy)
        assert result.stderr.startswith(f"error: {copy / 'summary.json'}: not a usable summary (")
    for damaged in (b"epoch,loss\n1,2\n", b"\xff\xfe"):
        (copy / "metrics.csv").write_bytes(damaged)
        result = run_tool("plot", copy)
        assert result.stderr.startswith(f"error: {copy / 'metrics.csv'}: not a usable table (")
        assert result.stderr.count("\n") == 1


def test_mistakes_are_the_most_confident_ones_under_titles_that_do_not_overlap(tmp_path, pyplot):
    classes = ["American pit bull terrier", "soft-coated wheaten terrier", "cat", "price in $ or in $"]
    logits = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))  # of no equal confidence
    labels = torch.arange(200) % 4
    saved = {"classes": classes, "mean": [0.5] * 3, "std": [0.2] * 3}
    data = tools.trained.as_data(torch.zeros(200, 32, 32, 3, dtype=torch.uint8), labels, saved)
    plot.draw_mistakes(logits, data, tmp_path / "mistakes.png", pyplot)
    figure = pyplot.gcf()
    confidence, predicted = logits.softmax(1).max(1)
    wrong = sorted((index for index in range(200) if predicted[index] != labels[index]), key=lambda i: -confidence[i])
    titles = [axis.title for axis in figure.axes]
    assert len(titles) == 32
    for title, index in zip(titles, wrong, strict=False):
        true, _, taken_for = title.get_text().partition("\nas ")
        assert classes[labels[index]].startswith(true.rstrip("\u2026"))
        name, share = taken_for.rsplit(" ", 1)
        assert classes[predicted[index]].startswith(name.rstrip("\u2026"))
        assert share == f"{100 * confidence[index]:.0f}%"
    extents = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for place, a in enumerate(extents) for b in extents[:place])
    plot.draw_mistakes(100 * torch.eye(4)[labels], data, tmp_path / "mistakes.png", pyplot)
    assert not (tmp_path / "mistakes.png").exists()


@pytest.mark.parametrize("count", [2, 10, 36, 300])
def test_a_confusion_matrix_of_any_number_of_classes_can_be_read(count, tmp_path, pyplot):
    names = [f"class number {index}" for index in range(count)]
    plot.draw_confusion(names, 9 + torch.eye(count), tmp_path / "confusion.png", pyplot)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 3100
    axis = pyplot.gcf().axes[0]
    shown = [text for text in (*axis.texts, *axis.get_yticklabels()) if text.get_text()]
    extents = [text.get_window_extent() for text in shown]
    assert len(shown) == (count**2 + count if count <= 36 else len(axis.get_yticklabels()))
    rows = extents[:count] if count <= 36 else extents
    assert not any(a.overlaps(b) for place, a in enumerate(rows) for b in rows[:place])
