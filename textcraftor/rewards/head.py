"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers without activations."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from textcraftor.errors import ModelError

LAYERS = (0, 2, 4, 6, 7)  # indices in nn.Sequential; the others are dropout


def fold_layers(layers: Mapping[str, Tensor], path: Path, prefix: str = "") -> tuple[Tensor, Tensor]:
    """The linear layers folded into one weight vector (D,) and one bias (), in float64.

    Exact, as there are no activations: W5(W4(...W1 e + b1...) + b4) + b5 = w.e + b.
    layers: tensors by key "layers.{index}.{weight,bias}".  path, prefix: file and prefix of its keys, for messages.
    Raises ModelError if keys are missing or unexpected, or the shapes do not chain down to one number.
    """
    expected = {f"layers.{index}.{part}" for index in LAYERS for part in ("weight", "bias")}
    if layers.keys() != expected:
        difference = ", ".join(prefix + key for key in sorted(layers.keys() ^ expected))
        raise ModelError(
            f"{path} does not hold the linear layers {prefix}layers.{{0,2,4,6,7}}: missing or unexpected {difference}"
        )
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
