"""A checkpoint holds what it must and nothing else, and what is read is what was written or refused by name."""

import errno
import hashlib
import math
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from helpers import Tiny, equal, equal_runs, flags, new_tiny, run_tiny, train

from training import checkpoint
from training.config import Config, RunError
from training.schema import FORMAT, check_schema

CONFIG = Config(epochs=2, batch_size=5, precision="fp32")
IDENTITY = {"variant": "tiny", "network": {"width": 1.0}, "recipe": CONFIG.recipe(), "seed": 0, "data": "23 images"}
IDENTITY |= {"classes": ["a", "b", "c"], "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "init_from": None}
ROW = {"epoch": 1, "learning_rate": 0.1, "loss": 1.0, "test_accuracy": 50.0, "images_per_second": 9.0, "seconds": 1.5}


@pytest.fixture(scope="module")
def trained():
    return train(CONFIG, epochs=1)[0]


@pytest.fixture
def path(tmp_path, trained):
    """Return the path of a small checkpoint after its first epoch."""
    checkpoint.save(tmp_path / "checkpoint.pt", trained, 1, IDENTITY, [ROW])
    return tmp_path / "checkpoint.pt"


def content_of(path):
    return torch.load(path, weights_only=True)


def save_again(path, trained, epoch=2):
    checkpoint.save(path, trained, epoch, IDENTITY, [ROW | {"epoch": number + 1} for number in range(epoch)])


# ---- Save and load -------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(path, trained):
    saved, other = checkpoint.load(path), new_tiny(replace(CONFIG, seed=1))
    checkpoint.restore(path, saved, other)
    for mine, theirs in ((trained.raw, other.raw), (trained.averaged, other.averaged)):
        assert equal(dict(mine.state_dict()), dict(theirs.state_dict()))
    for mine, theirs in zip(trained.optimizers, other.optimizers, strict=True):
        assert equal(mine.state_dict()["state"], theirs.state_dict()["state"])
    assert {key: saved[key] for key in IDENTITY} == IDENTITY
    assert saved["metrics"] == [ROW]
    assert saved["sha256"] == hashlib.sha256(path.read_bytes()[:-34]).hexdigest()


def test_settings_of_the_optimizers_are_the_command_lines_and_not_the_files(path):
    saved, state = checkpoint.load(path), new_tiny(CONFIG)
    for optimizer in saved["optimizer"]:
        optimizer["param_groups"] = [{"lr": 7.0, "momentum": 7.0, "params": []}]
    checkpoint.restore(path, saved, state)
    assert state.optimizers[0].param_groups[0]["momentum"] == CONFIG.momentum
    assert state.optimizers[1].param_groups[0]["betas"] == (0.9, 0.999)


def test_every_difference_to_another_run_is_named_with_both_values(path):
    saved = checkpoint.load(path)
    checkpoint.check_same_run(path, saved, IDENTITY)
    now = IDENTITY | {"variant": "other", "data": "24 images", "network": {"width": 2.0}, "init_from": "abc"}
    now["recipe"] = IDENTITY["recipe"] | {"epochs": 7}
    with pytest.raises(RunError) as caught:
        checkpoint.check_same_run(path, saved, now)
    for part in (
        "variant was tiny and is now other",
        "data was 23 images and is now 24 images",
        "width was 1.0 and is now 2.0",
        "epochs was 2 and is now 7",
        "init_from was None and is now abc",
        "--output-dir",
        "--fresh",
    ):
        assert part in str(caught.value)


# ---- Damage --------------------------------------------------------------------------------------------------------


def check_damage(path, lengths, flips):
    """Cut the file to each length and flip each (position, bit): it must be refused by name or load as it was."""
    content, whole, refused = path.read_bytes(), checkpoint.load(path), 0
    for length in lengths(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"checkpoint\.pt: not a usable checkpoint"):
            checkpoint.load(path)
    for position, bit in flips(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        try:
            assert equal(checkpoint.load(path), whole), (position, bit)
        except RunError as error:
            assert "checkpoint.pt: not a usable checkpoint" in str(error)
            refused += 1
    assert refused > 50


def test_a_cut_file_or_a_flipped_bit_is_refused_or_changes_nothing(path):
    check_damage(
        path,
        lambda size: [*range(0, size, size // 40), size - 1],
        lambda size: [(position, position % 8) for position in range(0, size, size // 300)],
    )


@pytest.mark.slow
def test_every_cut_and_every_flipped_bit_is_refused_or_changes_nothing(path):
    check_damage(path, range, lambda size: [(position, bit) for position in range(size) for bit in range(8)])


def sealed(content: bytes) -> bytes:
    """Add the right checksum to what somebody else made."""
    return content[:-2] + b"\x20\x00" + hashlib.sha256(content[:-2]).digest()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_payload_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.write(tmp_path / "zip.pt", {"format": 1, "model": Payload()})
    (tmp_path / "pickle.pt").write_bytes(sealed(pickle.dumps(Payload()) + b"  "))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(RunError, match="not a usable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_a_small_file_that_would_fill_the_memory_is_refused(path, how):
    checkpoint.write(path, content_of(path) | {"zeros": torch.zeros(100, 1000)})
    with zipfile.ZipFile(path) as archive:
        items = [(item.filename, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, content in items:
            archive.writestr(name, content)
        if how == "overlapping":  # many names for one content
            archive.filelist += [max(archive.filelist, key=lambda item: item.file_size)] * 9
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(RunError, match="it unpacks to more than its"):
        checkpoint.load(path)


def test_a_file_larger_than_a_checkpoint_can_be_is_refused_by_its_size_and_not_read(path):
    os.truncate(path, 2**40)  # sparse: it takes no room
    with pytest.raises(RunError, match=r"not a usable checkpoint \(1,099,511,627,776 bytes, more than"):
        checkpoint.load(path)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "lost").symlink_to("a disk that is not there")
    for name in ("folder", "pipe", "endless", "lost"):
        for read in (checkpoint.load, checkpoint.load_run):
            with pytest.raises(RunError, match=f"{name}: not a file"):
                read(tmp_path / name)


# ---- The schema ----------------------------------------------------------------------------------------------------


def weights(**changes):
    """Return a change of both networks' weights."""
    return lambda saved: {part: saved[part] | changes for part in ("model", "averaged")}


def optimizer(values):
    """Return a change of the first optimizer's first state."""
    return lambda saved: {"optimizer": [{"state": {0: values}}, *saved["optimizer"][1:]]}


MISSING, ZEROS, BOMB = object(), torch.zeros(8), ["x"]
SPARSE = torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=False)  # 4 TB
for _ in range(40):
    BOMB = [BOMB, BOMB]  # 2 ** 40 leaves in a few hundred bytes
ODD = {
    "a list": lambda saved: [1, 2],
    "a newer format": {"format": FORMAT + 1},
    "an older format": {"format": 0},
    "a format that is no number": {"format": "1"},
    "no epoch": {"epoch": MISSING},
    "no init_from": {"init_from": MISSING},
    "epoch 0": {"epoch": 0},
    "an epoch beyond the last": {"epoch": 3},
    "a huge epoch": {"epoch": 10**400},
    "an epoch that is no number": {"epoch": "many"},
    "no recipe": {"recipe": None},
    "a recipe that is a list": {"recipe": [1]},
    "NaN in the recipe": {"recipe": {"momentum": math.nan}},
    "a huge number in the recipe": {"recipe": {"momentum": 10**400}},
    "a tensor among the arguments": {"network": {"width": torch.zeros(2)}},
    "a nested list among the arguments": {"network": {"strides": [[1], [1]]}},
    "an endlessly nested list": {"network": {"strides": BOMB}},
    "an infinite width": {"network": {"width": math.inf}},
    "very long text": {"variant": "x" * 10**6},
    "a number as data": {"data": 7},
    "one class": {"classes": ["a"]},
    "classes twice": {"classes": ["a", "b", "a"]},
    "classes that are numbers": {"classes": [1, 2, 3]},
    "classes as text": {"classes": "abc"},
    "classes as lists": {"classes": [["a"], ["b"], ["c"]]},
    "an image size of nothing": {"image_size": 0},
    "a negative image size": {"image_size": -32},
    "a huge image size": {"image_size": 10**9},
    "a broken image size": {"image_size": 32.5},
    "a mean of two channels": {"mean": [0.5, 0.5]},
    "a mean that is a tensor": {"mean": torch.zeros(3)},
    "a mean of NaN": {"mean": [math.nan] * 3},
    "a standard deviation of 0": {"std": [0.0] * 3},
    "an infinite standard deviation": {"std": [math.inf] * 3},
    "init_from a list": {"init_from": ["abc"]},
    "init_from a number": {"init_from": 1.5},
    "metrics as text": {"metrics": "1,0.1"},
    "metrics of NaN": {"metrics": [ROW | {"loss": math.nan}]},
    "metrics without times": {"metrics": [{"epoch": 1, "loss": 1.0}]},
    "metrics of text": {"metrics": [ROW | {"loss": "1.0"}]},
    "a nested environment": {"environment": {"device": {"name": "cpu"}}},
    "NaN in a weight": weights(**{"classifier.bias": torch.tensor([0.0, math.nan, 0.0])}),
    "an infinite weight": weights(**{"classifier.bias": torch.tensor([0.0, math.inf, 0.0])}),
    "NaN as a statistic": weights(**{"norm.running_mean": ZEROS * math.nan}),
    "a negative variance": weights(**{"norm.running_var": ZEROS - 1}),
    "a weight of many elements in little memory": weights(**{"classifier.weight": torch.zeros(1).expand(10**6)}),
    "a sparse weight": weights(**{"classifier.weight": SPARSE}),
    "a complex weight": weights(**{"classifier.bias": torch.zeros(3, dtype=torch.complex64)}),
    "a weight that is a list": weights(**{"classifier.bias": [0.0, 0.0, 0.0]}),
    "weights under numbers": lambda saved: {"model": {1: ZEROS}},
    "an optimizer that is a list": {"optimizer": [[], []]},
    "an optimizer without its state": {"optimizer": [{}, {}]},
    "an endlessly nested optimizer state": optimizer({"momentum": BOMB}),
    "an optimizer state of little memory": optimizer({"momentum": torch.zeros(1).expand(10**6)}),
    "NaN in an optimizer state": optimizer({"momentum": torch.full((8, 3, 3, 3), math.nan)}),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_what_a_checkpoint_cannot_hold_is_refused_in_one_short_line(path, change):
    content = content_of(path)
    change = change(content) if callable(change) else change
    if isinstance(change, dict):
        change = {key: value for key, value in (content | change).items() if value is not MISSING}
    checkpoint.write(path, change)
    with pytest.raises(RunError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a usable checkpoint (it")
    assert len(message) < len(str(path)) + 340
    assert message.isprintable()


def test_what_a_checkpoint_may_hold_is_taken(path):
    content = content_of(path)
    check_schema(content)
    half = {name: value.half() if value.is_floating_point() else value for name, value in content["averaged"].items()}
    alone = {"model": {}, "averaged": half, "init_from": "0123456789abcdef", "classes": ["a\nb", "\u4e2d", "-x"]}
    checkpoint.write(path, {k: v for k, v in (content | alone).items() if k not in ("optimizer", "metrics")})
    assert checkpoint.load(path)["averaged"].keys() == content["averaged"].keys()
    with pytest.raises(RunError, match="it holds weights alone"):
        checkpoint.restore(path, checkpoint.load(path), new_tiny(CONFIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights(**{"classifier.weight": torch.zeros(3, 5)}), r"classifier\.weight"),
        (weights(other=ZEROS), "other"),
        (optimizer({"momentum": ZEROS}), "other names or shapes"),
        (optimizer({}), "other names or shapes"),  # which would start over unnoticed
        (optimizer({"velocity": torch.zeros(8, 3, 3, 3)}), "other names or shapes"),
        (lambda saved: {"optimizer": saved["optimizer"][:1]}, "zip"),
        (lambda saved: {"metrics": []}, "weights alone"),
    ],
)
def test_other_names_or_shapes_than_the_networks_are_refused(path, change, message):
    saved = checkpoint.load(path)
    saved |= change(saved)
    check_schema({key: saved[key] for key in saved if key != "sha256"})
    with pytest.raises(RunError, match=rf"not a usable checkpoint \(.*{message}"):
        checkpoint.restore(path, saved, new_tiny(CONFIG))


# ---- The generation before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_is_kept_by_a_link_or_where_there_are_none_by_a_copy(path, trained, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    first = path.read_bytes()
    save_again(path, trained)
    previous = checkpoint.previous_of(path)
    assert previous.read_bytes() == first
    assert checkpoint.load(path)["epoch"] == 2
    save_again(path, trained)
    assert checkpoint.load(previous)["epoch"] == 2
    assert sorted(os.listdir(path.parent)) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_a_damaged_checkpoint_names_the_one_before_with_which_the_run_goes_on(folders, tmp_path):
    output, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert run_tiny(*flags(folders, undisturbed)).returncode == 0
    assert run_tiny(*flags(folders, output)).returncode == 0
    (output / "checkpoint.pt").write_bytes(b"damaged")
    result = run_tiny(*flags(folders, output))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for part in ("checkpoint.pt: not a usable checkpoint", "checkpoint.previous.pt", "--fresh"):
        assert part in result.stderr
    assert (output / "checkpoint.pt").read_bytes() == b"damaged"
    (output / "checkpoint.previous.pt").replace(output / "checkpoint.pt")
    result = run_tiny(*flags(folders, output))
    assert "resuming after epoch 1, bit for bit" in result.stdout
    assert equal_runs(output / "checkpoint.pt", undisturbed / "checkpoint.pt")


def test_fresh_removes_both_checkpoints_the_metrics_and_the_summary(folders, tmp_path):
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "metrics.csv", "summary.json"):
        (tmp_path / name).write_text("of the old run")
    result = run_tiny(*flags(folders, tmp_path, 1), "--fresh")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "checkpoint.previous.pt").exists()
    assert all(path.read_bytes() != b"of the old run" for path in tmp_path.iterdir() if path.is_file())


def test_a_leftover_of_a_dead_run_is_ignored_and_goes_at_the_next_save(path, trained):
    path.with_name("checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    checkpoint.load_run(path)
    save_again(path, trained)
    checkpoint.load(path)
    assert sorted(os.listdir(path.parent)) == ["checkpoint.previous.pt", "checkpoint.pt"]


# ---- Metrics -------------------------------------------------------------------------------------------------------


def test_metrics_csv_is_written_from_the_checkpoint_whatever_became_of_it(folders, tmp_path):
    assert run_tiny(*flags(folders, tmp_path)).returncode == 0
    metrics = tmp_path / "metrics.csv"
    written = metrics.read_text()
    for damage in ("epoch,loss\n1,nan\n", written.splitlines()[0] + "\n", None):
        metrics.unlink() if damage is None else metrics.write_text(damage)
        assert run_tiny(*flags(folders, tmp_path)).returncode == 0
        assert metrics.read_text() == written
    rows = checkpoint.load(tmp_path / "checkpoint.pt")["metrics"]
    names, *lines = (line.split(",") for line in written.splitlines())
    assert [list(row) for row in rows] == [names] * 2
    assert [[float(value) for value in line] for line in lines] == [list(row.values()) for row in rows]


def test_a_run_that_resumes_keeps_the_rows_and_times_of_its_epochs(folders, tmp_path):
    assert run_tiny(*flags(folders, tmp_path)).returncode == 0
    path = tmp_path / "checkpoint.pt"
    checkpoint.previous_of(path).replace(path)
    saved = content_of(path)
    saved["metrics"][0]["seconds"] = 1000.0
    checkpoint.write(path, saved)
    (tmp_path / "summary.json").unlink()
    result = run_tiny(*flags(folders, tmp_path))
    assert "training time 17 min (1,000 seconds)" in result.stdout
    rows = checkpoint.load(path)["metrics"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0] == saved["metrics"][0]


@pytest.mark.parametrize("name", ["metrics.csv", "summary.json", "checkpoint.previous.pt"])
def test_a_foreign_file_in_the_folder_of_a_new_run_is_refused_and_kept(folders, tmp_path, name):
    (tmp_path / name).write_text("precious")
    result = run_tiny(*flags(folders, tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: {tmp_path / name} is there without its checkpoint.pt; choose another --output-dir, or start over "
        "with --fresh\n"
    )
    assert (tmp_path / name).read_text() == "precious"
    assert not (tmp_path / "checkpoint.pt").exists()


# ---- Pretrained weights --------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(folders, tmp_path):
    """Return the checkpoint of another run."""
    assert run_tiny(*flags(folders, tmp_path / "pretrained", 1)).returncode == 0
    return tmp_path / "pretrained" / "checkpoint.pt"


@pytest.mark.parametrize("fate", ["moved", "damaged", "not named"])
def test_a_run_that_started_from_pretrained_weights_resumes_without_their_file(folders, tmp_path, pretrained, fate):
    output, start = tmp_path / "run", ("--init-from", pretrained)
    undisturbed = run_tiny(*flags(folders, tmp_path / "undisturbed"), *start)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert run_tiny(*flags(folders, output), *start).returncode == 0
    path = output / "checkpoint.pt"
    checkpoint.previous_of(path).replace(path)
    if fate == "moved":
        pretrained.rename(tmp_path / "elsewhere.pt")
    elif fate == "damaged":
        pretrained.write_bytes(b"damaged")
    result = run_tiny(*flags(folders, output), *(() if fate == "not named" else start))
    assert result.returncode == 0, result.stderr
    assert "resuming after epoch 1, bit for bit" in result.stdout
    assert equal_runs(path, tmp_path / "undisturbed" / "checkpoint.pt")


def test_a_run_records_the_checksum_of_the_weights_that_it_started_from(folders, tmp_path, pretrained):
    still = ("--learning-rate", 0, "--adam-learning-rate", 0, "--init-from", pretrained)
    assert run_tiny(*flags(folders, tmp_path / "run", 1), *still).returncode == 0
    saved, start = checkpoint.load(tmp_path / "run" / "checkpoint.pt"), checkpoint.load(pretrained)
    assert saved["init_from"] == start["sha256"][:16]
    for name in (name for name, _ in Tiny().named_parameters()):
        assert torch.equal(saved["model"][name], start["averaged"][name])


@pytest.mark.parametrize("epochs", [1, 2])  # of 2 and of 1: unfinished, finished
def test_a_run_that_started_from_pretrained_weights_refuses_others(folders, tmp_path, pretrained, epochs):
    output, start = tmp_path / "run", ("--init-from", pretrained)
    assert run_tiny(*flags(folders, output, 2), *start).returncode == 0
    if epochs == 1:
        checkpoint.previous_of(output / "checkpoint.pt").replace(output / "checkpoint.pt")
    before, save = checkpoint.load(output / "checkpoint.pt")["init_from"], content_of(pretrained)
    save["averaged"]["classifier.bias"] += 1
    checkpoint.write(pretrained, save)
    result = run_tiny(*flags(folders, output, 2), *start)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"init_from was {before} and is now {checkpoint.load(pretrained)['sha256'][:16]}" in result.stderr


def test_a_run_that_started_without_pretrained_weights_refuses_them(folders, tmp_path, pretrained):
    assert run_tiny(*flags(folders, tmp_path / "run")).returncode == 0
    result = run_tiny(*flags(folders, tmp_path / "run"), "--init-from", pretrained)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    digest = checkpoint.load(pretrained)["sha256"][:16]
    assert f"init_from was None and is now {digest}" in result.stderr


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_pretrained_weights_that_the_run_would_replace_are_refused(folders, tmp_path, name):
    output = tmp_path / "run"
    assert run_tiny(*flags(folders, output, 2)).returncode == 0
    content = (output / name).read_bytes()
    there = output / ".." / "run" / name
    result = run_tiny(*flags(folders, output, 1), "--fresh", "--init-from", there)
    assert result.returncode == 2
    assert result.stderr.endswith(f"--init-from {there}: in this run's own folder; choose another --output-dir\n")
    assert (output / name).read_bytes() == content


def test_pretrained_weights_that_are_missing_or_damaged_are_named(folders, tmp_path, pretrained):
    missing = run_tiny(*flags(folders, tmp_path / "run"), "--init-from", tmp_path / "none.pt")
    assert (missing.returncode, missing.stderr) == (1, f"error: {tmp_path / 'none.pt'}: not a file\n")
    pretrained.write_bytes(b"damaged")
    damaged = run_tiny(*flags(folders, tmp_path / "run"), "--init-from", pretrained)
    assert damaged.returncode == 1
    assert damaged.stderr.startswith(f"error: {pretrained}: not a usable checkpoint (")
