"""Train and evaluate an image classifier on CIFAR-10, or on any folder of class folders: the loop of both scripts.

A script hands over a name, a function that builds its network, and a function that returns, for a configuration, the
builder's arguments as plain values:

    common.main("baseline", MobileNetV4, lambda config: dict(width=1.15, strides=(1, 1, 2, 2, 2)))

Read it in this order: run, train, train_epoch, predict, evaluate; main is the program. The loop's parts are in
training/. Randomness depends on (seed, epoch, rank) alone and the learning rate on the step alone, so that an
interrupted run resumes as if nothing had happened.
"""

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training import checkpoint, devices, report
from training.augmentation import augment, draw_epoch, random_generator
from training.checkpoint import State
from training.config import Config, RunError, errors_in_one_line, parse_command_line, stop_on_interrupt
from training.cpu import keep_freed_memory
from training.data import Data, load_data
from training.files import RunFolder, open_run_folder
from training.muon import Muon
from training.processes import Processes, join_processes
from training.report import Row
from training.summary import print_summary

ALONE = Processes()
ADVICE = "a lower --learning-rate or --adam-learning-rate may help"

Loss = Callable[[Tensor, Tensor], Tensor]  # of images and labels as augment returns them


# ---- The run -------------------------------------------------------------------------------------------------------


def run(
    name: str, build: Callable[..., nn.Module], arguments: dict[str, Any], config: Config, folder: RunFolder
) -> None:
    """Train from the start, or from the checkpoint of an interrupted run, to the end; then evaluate and report."""
    # Device
    keep_freed_memory()
    device = devices.choose(config.device)
    devices.set_up(device, config.threads)
    processes = join_processes(device)

    # The checkpoint to resume from, or pretrained weights
    saved = checkpoint.load_run(folder.checkpoint) if processes.rank == 0 and not config.fresh else None
    saved = processes.broadcast(saved)
    pretrained = None
    if config.init_from:
        try:
            pretrained = checkpoint.load(config.init_from)
        except RunError:
            if not (saved and saved["init_from"]):  # not needed to resume
                raise

    # Data, and the settings that depend on them
    data = load_data(config, device)
    config = resolve_settings(config, data, saved, processes)
    identity = run_identity(name, arguments, data, config, saved, pretrained)
    if changed := checkpoint.differences(processes.broadcast(identity), identity):
        raise RunError(f"process {processes.rank} is not like process 0: {'; '.join(changed)}")

    # Network and optimizers
    state = new_state(build, arguments, data, config, pretrained)
    if saved:
        checkpoint.check_same_run(folder.checkpoint, saved, identity)
        checkpoint.restore(folder.checkpoint, saved, state)
    rows = saved["metrics"] if saved else []

    # Header, training, evaluation, report
    facts = report.collect_facts(state.raw, data, config, processes)
    report.print_header(facts, identity, config, saved)
    unfinished = len(rows) < config.epochs
    if unfinished:
        train(state, data, config, identity | {"environment": report.environment(facts)}, rows, folder, processes)
    results = {"headline": "averaged", "seconds": round(sum(row["seconds"] for row in rows), 1)}
    results |= evaluate(state, data, config, processes)
    if processes.rank == 0:
        report.write_metrics(folder, rows)  # again, from the checkpoint
        if unfinished or not folder.summary.exists():  # a finished run keeps that of its training
            report.write_summary(folder, results, facts, identity, config)
        report.print_result(folder, results, config)
    processes.leave()


def resolve_settings(config: Config, data: Data, saved: dict[str, Any] | None, processes: Processes) -> Config:
    """Fit the batch to the data, and replace each `auto` by what the run started with or by what suits the device."""
    if config.batch_size > len(data.train_images):
        print(f"notice: --batch-size {config.batch_size} is reduced to the {len(data.train_images)} training images")
        config = replace(config, batch_size=len(data.train_images))
    count = processes.world_size
    if config.batch_size % count or config.batch_size < 2 * count:  # BN needs two images
        raise RunError(f"--batch-size {config.batch_size}: {count} processes cannot share it, two images or more each")
    for key in ("precision", "compile"):
        if saved and getattr(config, key) == "auto":
            with checkpoint.errors_naming(config.output_dir / "checkpoint.pt"):
                config = replace(config, **{key: saved["recipe"][key]})
    config = devices.resolve_auto(config, data.train_images.device, len(data.train_images))
    return replace(config, **processes.broadcast(config.recipe()))  # another process may have chosen otherwise


def run_identity(
    name: str,
    arguments: dict[str, Any],
    data: Data,
    config: Config,
    saved: dict[str, Any] | None,
    pretrained: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the settings and data that identify the run, as plain values: saved, and compared when it resumes."""
    start = saved["init_from"] if saved else None
    return {
        "variant": name,
        "network": {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()},
        "recipe": config.recipe(),
        "seed": config.seed,
        "data": data.fingerprint,
        "classes": data.classes,
        "image_size": config.image_size,
        "mean": data.mean,
        "std": data.std,
        "init_from": pretrained["sha256"][:16] if pretrained else start,
    }


def new_state(
    build: Callable[..., nn.Module],
    arguments: dict[str, Any],
    data: Data,
    config: Config,
    pretrained: dict[str, Any] | None,
) -> State:
    """Build the network on the device of the data, from the seed or from pretrained weights, its EMA and optimizers."""
    torch.manual_seed(config.seed)
    network = build(num_classes=len(data.classes), **arguments)
    if pretrained:
        with checkpoint.errors_naming(config.init_from, "--init-from file"):
            checkpoint.load_pretrained(network, pretrained, data.classes)
    device = data.train_images.device
    network.to(device, memory_format=devices.memory_format(device))
    return State(network, copy.deepcopy(network), make_optimizers(network, config))


def make_optimizers(network: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Return Muon for dense and 1x1 convolutions and inner linear layers, and AdamW for the rest.

    All weights decay, but no BN parameter and no bias.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    classifier = network.classifier.weight
    matrices = [layer.weight for layer in layers if getattr(layer, "groups", 1) == 1 and layer.weight is not classifier]
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in taken]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [vector for vector in others if vector.ndim == 1], "weight_decay": 0.0},
    ]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return [
        Muon(matrices, config.learning_rate, config.momentum, config.weight_decay, dtype),
        torch.optim.AdamW(groups, config.adam_learning_rate, fused=True),
    ]


# ---- Training ------------------------------------------------------------------------------------------------------


def train(
    state: State,
    data: Data,
    config: Config,
    identity: dict[str, Any],
    rows: list[Row],
    folder: RunFolder,
    processes: Processes = ALONE,
) -> None:
    """Train the epochs that are left; after each, append to `rows`, save a checkpoint and write metrics.csv."""
    begun = time.perf_counter()
    writes = processes.rank == 0
    if writes and not rows:
        previous = checkpoint.previous_of(folder.checkpoint)
        for old in (folder.summary, folder.metrics, previous, folder.checkpoint, folder.fresh):
            old.unlink(missing_ok=True)  # with --fresh; the checkpoint late: an interruption leaves a usable run
    loss_fn = make_loss(state, data, config, processes)
    split, steps = report.split_name(config), len(data.train_images) // config.batch_size
    report.print_columns(split)
    with tqdm(
        total=config.epochs * steps,
        initial=len(rows) * steps,
        unit="step",
        leave=False,
        disable=None if writes else True,
    ) as bar:
        for epoch in range(len(rows) + 1, config.epochs + 1):
            start = time.perf_counter()
            loss, rate = train_epoch(state, loss_fn, data, config, epoch, bar, processes)
            speed = steps * config.batch_size / (time.perf_counter() - start)
            logits = predict(state.averaged, data.test_images, data, config, processes=processes)
            check_finite(state, logits, epoch, config.learning_rate)
            row = {"epoch": epoch, "learning_rate": round(rate, 6), "loss": round(loss, 4)}
            row |= {f"{split}_{name}": round(value, 4) for name, value in score(logits, data.test_labels).items()}
            now = time.perf_counter()
            left = (config.epochs - epoch) * (now - start)
            seconds, begun = now - begun, now  # with compilation, or the save of the epoch before
            rows.append(row | {"images_per_second": round(speed, 1), "seconds": round(seconds, 1)})
            if writes:
                folder.check_lock()
                checkpoint.save(folder.checkpoint, state, epoch, identity, rows)
                try:
                    report.write_metrics(folder, rows)
                except RunError as error:  # the checkpoint has its rows; on Windows a spreadsheet may hold it open
                    print(f"notice: {error}", file=sys.stderr)
            with tqdm.external_write_mode():
                report.print_row(rows[-1], split, left)


def train_epoch(
    state: State, loss_fn: Loss, data: Data, config: Config, epoch: int, bar: tqdm, processes: Processes = ALONE
) -> tuple[float, float]:
    """Train for one epoch (the first is 1); return its mean loss and the learning rate of Muon at its end.

    The incomplete last batch is dropped; the order, and so the images dropped, differ each epoch. Of several processes,
    each takes its share of every batch. Losses stay on the device.
    """
    device, count = data.train_images.device, len(data.train_images)
    steps, share = count // config.batch_size, config.batch_size // processes.world_size
    total = config.epochs * steps
    state.raw.train()
    drawn = draw_epoch(count, config, epoch, device)
    seed = random_generator(config.seed, epoch).initial_seed()
    torch.manual_seed(seed + processes.rank)  # of stochastic depth
    averaged, raw = floating_tensors(state.averaged), floating_tensors(state.raw)
    losses = torch.zeros(steps, device=device)
    for step in range(steps):
        done = (epoch - 1) * steps + step
        fraction = schedule(done, total, config.warmup)
        rate = fraction * config.learning_rate
        start = step * config.batch_size + processes.rank * share
        loss = loss_fn(*augment(data, drawn, slice(start, start + share), config))
        loss.backward()
        processes.average([parameter.grad for parameter in state.raw.parameters()])
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * fraction
            optimizer.step()
            optimizer.zero_grad()
        ema_step = max(1 / max(1.0, config.ema_horizon * total), 10 / (10 + done))  # long at first: forget the start
        torch._foreach_lerp_(averaged, raw, ema_step)
        losses[step] = loss.detach()
        bar.update()
        if step == steps - 1 or step % 100 == 99:  # reading a loss waits for the device
            processes.average([losses[: step + 1]])
            check_losses(losses[: step + 1], epoch, rate)
    processes.average([buffer for network in (state.raw, state.averaged) for buffer in floating_buffers(network)])
    return losses.mean().item(), rate


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the fraction of the peak rate at `step` of `steps`: linear warm-up, then linear decay to zero."""
    rise = warmup * steps
    return min((step + 1) / (rise + 1), (steps - step) / (steps - rise))


def make_forward(network: nn.Module, data: Data, config: Config) -> Callable[[Tensor], Tensor]:
    """Return the function from images, uint8 (N, H, W, 3), to logits, float32 (N, classes)."""
    device = data.train_images.device
    mean, std = (torch.tensor(values, device=device) * 255 for values in (data.mean, data.std))
    layout = devices.memory_format(device)

    def forward(images: Tensor) -> Tensor:
        inputs = ((images.float() - mean) / std).permute(0, 3, 1, 2)  # (N, 3, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return network(inputs.contiguous(memory_format=layout)).float()

    return forward


def make_loss(state: State, data: Data, config: Config, processes: Processes = ALONE) -> Loss:
    """Return the loss to train with, compiled if the configuration says so; `processes` share each batch."""
    device = data.train_images.device
    forward = make_forward(state.raw, data, config)

    def loss_fn(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(forward(images), labels, label_smoothing=config.label_smoothing)

    if config.compile == "on" and devices.can_compile(device):
        print("compiling the network: one to three minutes the first time, seconds after that", flush=True)
        drawn = draw_epoch(len(data.train_images), config, 1, device)
        batch = augment(data, drawn, slice(config.batch_size // processes.world_size), config)
        with devices.compile_cache():
            loss_fn = devices.compiled(loss_fn, device)
            compile_ahead(state.raw, loss_fn, batch)
    return loss_fn


def compile_ahead(network: nn.Module, loss_fn: Loss, batch: tuple[Tensor, Tensor]) -> None:
    """Compute a loss and its gradients, which compiles both, and leave the network as it was."""
    statistics = list(network.train().buffers())
    before = [tensor.clone() for tensor in statistics]
    loss_fn(*batch).backward()
    torch._foreach_copy_(statistics, before)
    network.zero_grad()


def floating_buffers(network: nn.Module) -> list[Tensor]:
    """Return BN's running means and variances."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


def floating_tensors(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


def check_losses(losses: Tensor, epoch: int, rate: float) -> None:
    """Stop at the first loss that is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise RunError(
            f"the loss became {losses[bad[0]].item()} in epoch {epoch}, step {bad[0].item() + 1}, at a learning rate "
            f"of about {rate:.3g}; nothing of this epoch was saved; {ADVICE}"
        )


def check_finite(state: State, logits: Tensor, epoch: int, rate: float) -> None:
    """Stop if a weight, a BN statistic, a logit or an optimizer's state is not finite, which finite losses can hide."""
    tensors = {"a logit of the evaluation": logits.to(next(state.raw.parameters()).device)}
    for weights, network in (("raw", state.raw), ("averaged", state.averaged)):
        tensors |= {f"{name} of the {report.WEIGHTS[weights]}": tensor for name, tensor in network.state_dict().items()}
    for optimizer in state.optimizers:
        for index, values in enumerate(optimizer.state.values()):
            of = f"of {type(optimizer).__name__}'s weight {index}"
            tensors |= {f"{name} {of}": tensor for name, tensor in values.items()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()  # one read of the device
    for name, good in zip(tensors, finite, strict=True):
        if not good:
            raise RunError(
                f"{name} is not finite after epoch {epoch}, with a learning rate of up to {rate:.3g}; this epoch was "
                f"not saved; {ADVICE}"
            )


# ---- Evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    network: nn.Module, images: Tensor, data: Data, config: Config, *, flip: bool = False, processes: Processes = ALONE
) -> Tensor:
    """Return the logits of all images, float32 (N, classes) on the CPU, those of the mirrored images if `flip`.

    Of several processes, each computes its share of the batches, and all get all logits.
    """
    network.eval()
    forward = make_forward(network, data, config)
    logits = torch.zeros(len(images), len(data.classes), device=images.device)
    size = devices.evaluation_batch(images.device, images.shape[1])
    batches = list(zip(images.split(size), logits.split(size), strict=True))
    for batch, result in batches[processes.rank :: processes.world_size]:
        result.copy_(forward(batch.flip(2) if flip else batch))
    processes.all_reduce(logits)
    return logits.cpu()


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1 accuracy in per cent, and the mean cross-entropy."""
    labels = labels.cpu()
    correct = (logits.argmax(1) == labels).sum().item()
    return {"accuracy": 100 * correct / len(labels), "loss": F.cross_entropy(logits, labels).item()}


def evaluate(state: State, data: Data, config: Config, processes: Processes = ALONE) -> dict[str, Any]:
    """Evaluate raw and EMA weights on every test image, without and (where flips make sense) with flip TTA.

    The headline is that of the EMA weights; this choice was made on held-out images. Flip TTA, a test-time
    augmentation, adds the logits of an image and of its mirror image. Per-class accuracies and the confusion matrix
    (rows: true classes) are those of the headline weights without it.
    """
    labels, accuracy, loss = data.test_labels.cpu(), {}, {}
    for weights, network in (("raw", state.raw), ("averaged", state.averaged)):
        logits = predict(network, data.test_images, data, config, processes=processes)
        accuracy[weights], loss[weights] = score(logits, labels).values()
        if config.flip != "none":
            mirrored = predict(network, data.test_images, data, config, flip=True, processes=processes)
            accuracy[f"{weights}_tta"] = score(logits + mirrored, labels)["accuracy"]
        if weights == "averaged":
            details = by_class(logits, labels, data.classes)
    split = report.split_name(config)
    return {f"{split}_accuracy": accuracy, f"{split}_loss": loss, **details}


def by_class(logits: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """Return the accuracy of each class in per cent and, up to 300 classes, the confusion matrix."""
    count, predicted = len(classes), logits.argmax(1)
    hits, images = (values.bincount(minlength=count) for values in (labels[predicted == labels], labels))
    accuracy = (100 * hits.double() / images).tolist()
    details: dict[str, Any] = {"per_class_accuracy": dict(zip(classes, accuracy, strict=True))}
    if count <= 300:
        matrix = (labels * count + predicted).bincount(minlength=count**2).view(count, count)
        details["confusion_matrix"] = matrix.tolist()
    return details


# ---- The program ---------------------------------------------------------------------------------------------------


def main(name: str, build: Callable[..., nn.Module], arguments: Callable[[Config], dict[str, Any]]) -> None:
    """Parse the command line and run; the whole program of a script.

    Args:
        name: Of the variant; names the run's folder and is kept in the checkpoint.
        build: Returns the network, called with num_classes and what `arguments` returns; its last layer is called
            `classifier`.
        arguments: Returns plain values, which are kept in the checkpoint, for a configuration.
    """
    config = parse_command_line(name)
    stop_on_interrupt()
    with errors_in_one_line("; a smaller --batch-size or --image-size needs less"):
        if config.summary:
            print_summary(build(num_classes=10, **arguments(config)), config.image_size)
            return
        writes = not torch.distributed.is_torchelastic_launched() or os.environ["RANK"] == "0"
        place = open_run_folder(config.output_dir) if writes else contextlib.nullcontext(RunFolder(config.output_dir))
        with place as folder:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun's restart resumes what has begun
                config = replace(config, fresh=config.fresh and folder.fresh.exists())
            elif writes and config.fresh:
                folder.fresh.touch()
            run(name, build, arguments(config), config, folder)
