"""The parts of the training loop in common.py, one file each; none of them knows MobileNetV4 or the loop."""
