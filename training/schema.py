"""What a checkpoint may hold: plain values within bounds and whole, finite tensors. All else is refused."""

import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.config import printable

FORMAT = 1  # raised when an older program could misread it


def is_number(value: Any, low: float = -1e300, high: float = 1e300) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is not


def is_text(value: Any) -> bool:
    return type(value) is str and len(value) < 1000


def is_list(value: Any, is_item: Callable[[Any], bool], low: int = 0, high: int = 10**6) -> bool:
    return type(value) is list and low <= len(value) <= high and all(map(is_item, value))


def is_mapping(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return type(value) is dict and len(value) < 10**6 and all(is_text(key) and is_item(value[key]) for key in value)


def is_settings(value: Any) -> bool:
    return is_mapping(
        value, lambda v: type(v) in (bool, type(None)) or is_number(v) or is_text(v) or is_list(v, is_number)
    )


def is_weight(value: Any) -> bool:
    """Return whether a value is a tensor that has all of its elements in memory, each finite."""
    dtypes = (torch.float32, torch.float16, torch.int64)
    if type(value) is not Tensor or value.layout != torch.strided or value.dtype not in dtypes:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes() and bool(value.isfinite().all())


def is_weights(value: Any) -> bool:
    return is_mapping(value, is_weight) and all((value[key] >= 0).all() for key in value if key.endswith("running_var"))


def is_optimizer(value: Any) -> bool:
    """Return whether a value holds an optimizer's state; load_state_dict copies whatever is in there."""
    state = value.get("state") if type(value) is dict else None
    return type(state) is dict and all(is_mapping(tensors, is_weight) for tensors in state.values())


def is_row(value: Any) -> bool:
    return is_mapping(value, is_number) and {"epoch", "seconds"} <= value.keys()


SCHEMA: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: is_number(v, 1, FORMAT),
    "variant": is_text,
    "network": is_settings,  # the builder's arguments
    "recipe": is_settings,  # Config.recipe()
    "seed": is_number,
    "data": is_text,  # fingerprint
    "classes": lambda v: is_list(v, is_text, 2) and len(set(v)) == len(v),
    "image_size": lambda v: type(v) is int and 16 <= v <= 512,
    "mean": lambda v: is_list(v, lambda x: is_number(x, 0, 1), 3, 3),
    "std": lambda v: is_list(v, lambda x: is_number(x, 1e-6, 1), 3, 3),
    "init_from": lambda v: v is None or is_text(v),  # checksum of the weights that the run started from
    "epoch": lambda v: type(v) is int and 1 <= v <= 10**6,
    "model": is_weights,  # empty in a file of EMA weights alone
    "averaged": is_weights,
}
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "environment": is_settings,  # device, threads, ... : resuming elsewhere is allowed, but not bit for bit
    "metrics": lambda v: is_list(v, is_row),  # of each epoch done; the one place with times
    "optimizer": lambda v: is_list(v, is_optimizer),  # names and shapes: see restore
}


def check_schema(saved: Any) -> None:
    """Refuse everything but plain values, within bounds, under the names of SCHEMA and OPTIONAL.

    Raises:
        ValueError: naming the first that is missing or wrong.
    """
    if type(saved) is not dict:
        raise ValueError(f"it holds a {type(saved).__name__}")
    if type(saved.get("format")) is int and saved["format"] > FORMAT:
        raise ValueError(f"its format is {saved['format']}, this program reads up to {FORMAT}")
    if unknown := saved.keys() - (SCHEMA | OPTIONAL).keys():
        raise ValueError(f"it has {printable(reprlib.repr(unknown))}, which no checkpoint has")
    for key, is_right in (SCHEMA | OPTIONAL).items():
        if key not in saved and key in SCHEMA:
            raise ValueError(f"it has no {key}")
        if key in saved and not is_right(saved[key]):
            raise ValueError(f"its {key} is not valid: {printable(reprlib.repr(saved[key]))}")
    if saved["epoch"] > saved["recipe"].get("epochs", saved["epoch"]):
        raise ValueError(f"its epoch is {saved['epoch']} of {saved['recipe']['epochs']}")
