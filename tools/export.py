"""Ship a trained network, in the form that the suffix of FILE tells.

    python -m tools.export runs/baseline/checkpoint.pt baseline.onnx --int8 --data-dir data    # also baseline.int8.onnx
    python -m tools.export runs/baseline/checkpoint.pt baseline.pt2    # torch.export
    python -m tools.export runs/baseline/checkpoint.pt baseline.pt     # weights alone, in half precision

The first two take plain RGB images in 0..1, float32 (N, 3, H, W) of the training's size, to logits (N, classes): the
normalisation is inside, BN is folded into the convolutions. What was written is compared with the network before it is
kept. Then come size, latency of a single image on this CPU, and with --data-dir the accuracy on the test images, which
tells what --int8 costs. ONNX needs `pip install onnx onnxscript onnxruntime`. Weights alone are for --evaluate, for
--init-from and for these tools.
"""

import argparse
import copy
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import common
from tools import failures_in_one_line, load_data, load_network, optional

TOLERANCE = 1e-3  # of the largest logit, between what was written and the network in float32
Run = Callable[[np.ndarray], np.ndarray]  # from images, float32 (N, 3, H, W) in 0..1, to logits (N, classes)


# ---- The network as it is shipped ----------------------------------------------------------------------------------


class Deployed(nn.Module):
    """The network with its normalisation inside and its BN folded, made of nothing but PyTorch's own layers.

    Shapes: RGB images in 0..1 (N, 3, H, W) -> logits (N, classes).
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.network = fold(copy.deepcopy(network).eval())

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


def write_weights(checkpoint: Path, file: Path) -> None:
    """Write the averaged weights and BN statistics as float16, with the settings, classes, mean and std of the run.

    Raises:
        RunError: if the checkpoint cannot be read, or the file not written.
    """
    saved = common.load_checkpoint(checkpoint)
    kept = {key: value for key, value in saved.items() if key != "optimizer"}
    weights = saved[common.HEADLINE]
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise common.RunError(f"{checkpoint}: {name} has values beyond the range of half precision")
    common.write_checkpoint(file, kept | {"model": {}, "averaged": halves})


def write_onnx(deployed: Deployed, images: Tensor, file: Path, saved: dict[str, Any]) -> None:
    """Write ONNX with any number of images, and classes and image size as its metadata."""
    onnx, *_ = optional("onnx", "onnxscript", "onnxruntime")
    torch.onnx.export(
        deployed,
        (images,),
        file,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(file)
    onnx.helper.set_model_props(
        model, {"classes": "\n".join(saved["classes"]), "image_size": str(saved["image_size"]), "input": "RGB in 0..1"}
    )
    onnx.save(model, file)


def run_onnx(file: Path) -> Run:
    (onnxruntime,) = optional("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def write_pt2(deployed: Deployed, images: Tensor, file: Path, saved: dict[str, Any]) -> None:
    """Write a torch.export program with any number of images, and classes and image size as an extra file."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    about = json.dumps({key: saved[key] for key in ("classes", "image_size")})
    program = torch.export.export(deployed, (images,), dynamic_shapes=shapes)
    content = io.BytesIO()  # for writing, PyTorch's own errors are not OSErrors
    torch.export.save(program, content, extra_files={"about.json": about})
    file.write_bytes(content.getvalue())


def run_pt2(file: Path) -> Run:
    module = torch.export.load(file).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def quantize(source: Path, target: Path, images: np.ndarray) -> None:
    """Quantise ONNX to 8 bits after training, with ranges from `images`, float32 (N, 3, H, W) in 0..1."""
    (quantization,) = optional("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, max(1, len(images) // 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )


# ---- Checks --------------------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> np.ndarray:
    """Return uint8 (N, H, W, 3) as float32 (N, 3, H, W) in 0..1."""
    return np.ascontiguousarray((images.cpu().float() / 255).permute(0, 3, 1, 2).numpy())


def check(run: Run, network: nn.Module, saved: dict[str, Any], file: Path) -> None:
    """Compare logits with those of the network as it was trained, unfolded, for one image and for several.

    Raises:
        RunError: if they differ.
    """
    mean, std = (torch.tensor(saved[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for count in (1, 5):
        images = torch.rand(count, 3, saved["image_size"], saved["image_size"])
        with torch.no_grad():
            expected = network((images - mean) / std).numpy()
        distance = np.abs(run(images.numpy()) - expected).max() / np.abs(expected).max()
        if not distance <= TOLERANCE:
            raise common.RunError(f"{file}: its logits differ from the network's by {distance:.2g} of the largest")


def describe(kind: str, run: Run, file: Path, size: int, data: common.Data | None) -> str:
    """Return a row: accuracy on the test images, bytes, and the median latency of one image."""
    image, times = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32), []
    for _ in range(110):
        begun = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - begun)
    accuracy = "-"
    if data is not None:
        batches = data.test_images.split(250)
        logits = torch.from_numpy(np.concatenate([run(pixels(batch)) for batch in batches]))
        accuracy = f"{common.accuracy(logits, data.test_labels):.2f}%"
    megabytes, milliseconds = file.stat().st_size / 1e6, 1e3 * statistics.median(times[10:])
    return f"{kind:<8}{accuracy:>9}{megabytes:>9.2f} MB{milliseconds:>9.2f} ms  {file}"


FORMATS = {".onnx": (write_onnx, run_onnx), ".pt2": (write_pt2, run_pt2)}


def export(options: argparse.Namespace) -> None:
    """Write, compare, keep, and tell."""
    file, device = options.file, common.pick_device("cpu", 0)
    if options.int8 and (file.suffix != ".onnx" or not options.data_dir):
        raise common.RunError("--int8: only for .onnx, with training images from --data-dir")
    if file.resolve() == options.checkpoint.resolve():
        raise common.RunError(f"{file}: this would replace the checkpoint")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pt":
        write_weights(options.checkpoint, file)
        print(f"{file}: {file.stat().st_size:,} bytes")
        return
    write, run_file = FORMATS[file.suffix]
    network, saved = load_network(options.checkpoint)
    data = load_data(saved, options.data_dir, device)[0] if options.data_dir else None
    if options.int8 and not len(data.train_images):
        raise common.RunError(f"--int8: no training images in {options.data_dir}; expected train/ and test/")
    temporary = file.with_name(f"{file.stem}.tmp{file.suffix}")
    deployed = Deployed(network, saved["mean"], saved["std"]).eval()
    try:
        write(deployed, torch.rand(2, 3, saved["image_size"], saved["image_size"]), temporary, saved)
        run = run_file(temporary)
        check(run, network, saved, file)
        os.replace(temporary, file)
        print(f"{'':<8}{'accuracy':>9}{'size':>12}{'one image':>12}")
        print(describe("float32", run, file, saved["image_size"], data))
        if options.int8:
            chosen = torch.randperm(len(data.train_images), generator=common.random_generator(0, 0))[:1024]
            images, small = pixels(data.train_images[chosen]), file.with_name(f"{file.stem}.int8.onnx")
            quantize(file, temporary, images)
            run = run_file(temporary)
            if not np.isfinite(run(images[:5])).all():
                raise common.RunError(f"{small}: its logits are not finite")
            os.replace(temporary, small)
            print(describe("int8", run, small, saved["image_size"], data))
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a run, or of this program's weights alone")
    parser.add_argument("file", type=Path, help="what is written, ending in .onnx, .pt2 or .pt")
    parser.add_argument("--int8", action="store_true", help="also quantise, with ranges from 1,024 training images")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="CIFAR-10, or train/ and test/ with a folder for each class: for the accuracy and for --int8",
    )
    options = parser.parse_args()
    with failures_in_one_line():
        if options.file.suffix not in (".pt", *FORMATS):
            raise common.RunError(f"{options.file}: expected a name that ends in .onnx, .pt2 or .pt")
        export(options)


if __name__ == "__main__":
    main()
