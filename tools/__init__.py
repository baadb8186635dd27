"""What people do after training, one module per job: `python -m tools.NAME` from the repository's root."""

from pathlib import Path
from typing import Any

from torch import nn

import common
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4

BUILDERS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}


def load_network(checkpoint: Path, *, weights: str = common.HEADLINE) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint with its weights, for evaluation.

    Args:
        checkpoint: Of a run of either script, or of `tools.export`.
        weights: "averaged", or "raw", which weights in half precision lack.

    Returns:
        The network, and all that the checkpoint holds.

    Raises:
        RunError: naming the file, if it is none of these, or damaged.
    """
    saved = common.load_checkpoint(checkpoint)
    with common.reading(checkpoint):
        if saved["variant"] not in BUILDERS:
            raise ValueError(f"its variant is {saved['variant']}, known are {', '.join(BUILDERS)}")
        network = BUILDERS[saved["variant"]](len(saved["classes"]), **saved["network"])
        network.load_state_dict(saved["model" if weights == "raw" else weights])
    return network.eval(), saved
