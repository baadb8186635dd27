"""The parts of the training loop in common.py, one file each; none of them imports a network or the loop."""
