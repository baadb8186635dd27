"""Export a trained network, in the format that the ending of FILE names.

    python -m tools.export runs/baseline/checkpoint.pt baseline.onnx --int8    # also baseline.int8.onnx
    python -m tools.export runs/baseline/checkpoint.pt baseline.pt2    # torch.export
    python -m tools.export runs/baseline/checkpoint.pt baseline.pt     # EMA weights alone, in half precision

The first two map RGB images in 0..1, float32 (N, 3, H, W) of the training size, to logits (N, classes): normalisation
is included, BN is folded. Before writing, the float32 logits are compared with the network's; those of int8 have
only to be finite. Printed are size, latency of one image on this CPU, and with --data-dir or --int8 the accuracy.
ONNX needs `pip install onnx onnxscript onnxruntime`. EMA weights alone are for --init-from and for these tools.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from common import score
from tools import Trained, exit_in_one_line, load_images, load_network, make_folder, new_parser, optional
from training.augmentation import random_generator
from training.checkpoint import load, write
from training.config import RunError, printable
from training.data import Data
from training.files import atomic_write
from training.schema import SCHEMA

TOLERANCE = 1e-3  # of the largest logit, between what was written and the network in float32
Run = Callable[[np.ndarray], np.ndarray]  # from images, float32 (N, 3, H, W) in 0..1, to logits (N, classes)

# ---- The network to deploy -----------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """The network with its normalisation inside, its BN folded, and plain convolutions in place of DepthwiseConv2d.

    Shapes: RGB images in 0..1 (N, 3, H, W) -> logits (N, classes).
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(trained.saved[name]).view(1, 3, 1, 1))
        self.network = fold(copy.deepcopy(trained.network))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def fold(network: nn.Module) -> nn.Module:
    """Fold each BN into the convolution or linear layer before it, in place, and return the network."""
    for parent in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for index, (layer, norm) in enumerate(zip(parent, list(parent)[1:], strict=False)):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent[index] = plain_convolution(fuse_conv_bn_eval(layer, norm))
            elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                parent[index] = fuse_linear_bn_eval(layer, norm)
            else:
                continue
            parent[index + 1] = nn.Identity()
    return network.requires_grad_(False)


def plain_convolution(layer: nn.Conv2d) -> nn.Conv2d:
    """Return an nn.Conv2d in place of a subclass that does the same."""
    shape = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    plain = nn.Conv2d(*shape, groups=layer.groups)
    plain.load_state_dict(layer.state_dict())
    return plain


# ---- Formats -------------------------------------------------------------------------------------------------------


def write_weights(trained: Trained, file: Path) -> None:
    """Write the EMA of weights and BN statistics as float16, with the settings, classes, mean and std of the run."""
    saved = trained.saved
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in saved["averaged"].items()
    }
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise RunError(f"{printable(trained.path)}: {name} has values beyond the range of half precision")
    write(file, {key: saved[key] for key in SCHEMA} | {"model": {}, "averaged": halves})


def example_images(trained: Trained, count: int) -> Tensor:
    return torch.rand(count, 3, trained.config.image_size, trained.config.image_size)


def to_program(trained: Trained) -> torch.export.ExportedProgram:
    """Return a program that takes any number of images."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(Deployed(trained).eval(), (example_images(trained, 2),), dynamic_shapes=shapes)


def to_onnx(trained: Trained) -> bytes:
    """Return ONNX with classes (JSON) and image size as its metadata."""
    onnx, *_ = optional("onnx", "onnxscript", "onnxruntime")
    names = dict(input_names=["images"], output_names=["logits"], dynamic_shapes={"images": {0: "batch"}})
    model = torch.onnx.export(to_program(trained), **names, dynamo=True, verbose=False).model_proto
    classes, size = json.dumps(trained.saved["classes"]), str(trained.saved["image_size"])
    onnx.helper.set_model_props(model, {"classes": classes, "image_size": size, "input": "RGB in 0..1"})
    return model.SerializeToString()


def run_onnx(content: bytes) -> Run:
    (onnxruntime,) = optional("onnxruntime")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def to_pt2(trained: Trained) -> bytes:
    """Return an archive of torch.export with classes and image size as about.json."""
    about, content = json.dumps({key: trained.saved[key] for key in ("classes", "image_size")}), io.BytesIO()
    torch.export.save(to_program(trained), content, extra_files={"about.json": about})
    return content.getvalue()


def run_pt2(content: bytes) -> Run:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def quantize(content: bytes, images: np.ndarray) -> bytes:
    """Return ONNX quantised to 8 bits after training, with ranges from `images`, float32 (N, 3, H, W) in 0..1."""
    onnx, quantization = optional("onnx", "onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        batches = iter(np.array_split(images, max(1, len(images) // 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    types = dict(activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8)
    with tempfile.TemporaryDirectory() as folder:
        source, target = onnx.load_from_string(content), Path(folder, "int8.onnx")
        logging.disable(logging.WARNING)  # advice to fuse layers first, which the exporter did
        quantization.quantize_static(source, target, Reader(), per_channel=True, **types)
        logging.disable(logging.NOTSET)
        return target.read_bytes()


FORMATS = {".onnx": (to_onnx, run_onnx), ".pt2": (to_pt2, run_pt2)}


# ---- Checks --------------------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> np.ndarray:
    """Return uint8 (N, H, W, 3) as float32 (N, 3, H, W) in 0..1."""
    return np.ascontiguousarray((images.cpu().float() / 255).permute(0, 3, 1, 2).numpy())


def calibration_images(data: Data) -> np.ndarray:
    """Draw 1,024 training images, the same at each call, as `pixels` returns them."""
    chosen = torch.randperm(len(data.train_images), generator=random_generator(0, 0))[:1024]
    return pixels(data.train_images[chosen])


def check(run: Run, trained: Trained, file: Path) -> None:
    """Refuse logits that differ from those of the network as it was trained, unfolded, for one image or several."""
    mean, std = (torch.tensor(trained.saved[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for count in (1, 5):
        images = example_images(trained, count)
        with torch.no_grad():
            expected = trained.network((images - mean) / std).numpy()
        distance = np.abs(run(images.numpy()) - expected).max() / np.abs(expected).max()
        if not distance <= TOLERANCE:
            raise RunError(f"{printable(file)}: its logits differ from the network's by {distance:.2g} of the largest")


def check_target(file: Path, checkpoint: Path) -> None:
    """Refuse to write over the checkpoint that is read, or over one from which a run resumes."""
    resumes = file.name in ("checkpoint.pt", "checkpoint.previous.pt") and file.with_name(".lock").exists()
    if file.exists():
        with contextlib.suppress(RunError):  # of what is no checkpoint
            resumes |= file.samefile(checkpoint) or "optimizer" in load(file)
    if resumes:
        raise RunError(f"{printable(file)}: this would replace a checkpoint; choose another name")


def latency(run: Run, size: int) -> float:
    """Return the median time of one image on this CPU, in milliseconds."""
    image, times = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32), []
    for _ in range(110):
        start = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[10:])


def describe(kind: str, run: Run, file: Path, size: int, data: Data | None) -> str:
    """Return a row: accuracy, bytes, and the median latency of one image."""
    milliseconds, accuracy = latency(run, size), "-"
    if data is not None:
        batches = data.test_images.split(250)
        logits = torch.from_numpy(np.concatenate([run(pixels(batch)) for batch in batches]))
        accuracy = f"{score(logits, data.test_labels)['accuracy']:.2f}%"
    megabytes = file.stat().st_size / 1e6
    return f"{kind:<8}{accuracy:>17}{megabytes:>9.2f} MB{milliseconds:>9.2f} ms  {printable(file)}"


# ---- The program ---------------------------------------------------------------------------------------------------


def export(options: argparse.Namespace) -> None:
    """Load, convert, compare, write, and report."""
    file = options.file
    if file.suffix not in (".pt", *FORMATS):
        raise RunError(f"{printable(file)}: expected a name that ends in .onnx, .pt2 or .pt")
    if options.int8 and file.suffix != ".onnx":
        raise RunError("--int8: only for .onnx")
    if options.data_dir and file.suffix == ".pt":
        raise RunError("--data-dir: only for .onnx and .pt2; tools.evaluate evaluates a .pt file")
    trained, data, facts = load_network(options.checkpoint), None, {"split": "test"}
    small = file.with_name(f"{file.stem}.int8.onnx")
    for target in (file, small)[: 1 + options.int8]:
        check_target(target, options.checkpoint)
    make_folder(file.parent)
    if file.suffix == ".pt":
        write_weights(trained, file)
        print(f"{printable(file)}: {file.stat().st_size:,} bytes")
        return
    if options.int8 or options.data_dir:
        data, facts = load_images(trained, options.data_dir)
    if options.int8 and not len(data.train_images):
        raise RunError(f"--int8: no training images in {printable(options.data_dir)}; expected train/ and test/")
    convert, make_run = FORMATS[file.suffix]
    content = convert(trained)
    run = make_run(content)
    check(run, trained, file)
    with atomic_write(file) as target:
        target.write(content)
    print(f"{'':<8}{facts['split'] + ' accuracy':>17}{'size':>12}{'one image':>12}")
    print(describe("float32", run, file, trained.config.image_size, data))
    if options.int8:
        images = calibration_images(data)
        content = quantize(content, images)
        run = run_onnx(content)
        if not np.isfinite(run(images[:5])).all():
            raise RunError(f"{printable(small)}: its logits are not finite")
        with atomic_write(small) as target:
            target.write(content)
        print(describe("int8", run, small, trained.config.image_size, data))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or a .pt file of tools.export")
    parser.add_argument("file", type=Path, help="to write, ending in .onnx, .pt2 or .pt")
    parser.add_argument("--int8", action="store_true", help="also quantise, calibrated on 1,024 training images")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="report the accuracy on these images (default for --int8: the run's)",
    )
    options = parser.parse_args()
    with exit_in_one_line():
        export(options)


if __name__ == "__main__":
    main()
