"""The linear stack on which LAION's aesthetic predictor and ImageReward end: five layers, no activation between them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from textcraftor.errors import ModelError

LAYERS = (0, 2, 4, 6, 7)  # between them sat dropout, which is nothing at inference


def collapse(layers: Mapping[str, Tensor], path: Path, prefix: str = "") -> tuple[Tensor, Tensor]:
    """The stack of linear layers as one vector (D,) and one bias (), in float64.

    There is no activation between them, so W5(W4(...W1 e + b1...) + b4) + b5 = w.e + b.
    prefix: what stands before "layers." in the file's keys, for the message.
    Raises ModelError when keys are missing or foreign, or the shapes do not chain down to one number.
    """
    expected = {f"layers.{index}.{part}" for index in LAYERS for part in ("weight", "bias")}
    if layers.keys() != expected:
        odd = ", ".join(prefix + key for key in sorted(layers.keys() ^ expected))
        raise ModelError(f"{path} is not the linear stack {prefix}layers.{{0,2,4,6,7}}: missing or unexpected {odd}")
    first, *rest = LAYERS
    weight, bias = layers[f"layers.{first}.weight"].double(), layers[f"layers.{first}.bias"].double()
    try:
        for index in rest:
            matrix = layers[f"layers.{index}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + layers[f"layers.{index}.bias"].double()
        return weight.squeeze(0).reshape(weight.shape[-1]), bias.reshape(())
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(layers[f"layers.{index}.weight"].shape)) for index in LAYERS)
        raise ModelError(f"{path}: {prefix}layers of shapes {shapes} do not chain down to one number") from error
