"""The weights that training ends with; test_trainer has them in whole runs."""

from collections import OrderedDict

import torch
from torch import nn

from textcraftor.config import TrainConfig
from textcraftor.models.lora import add_lora
from textcraftor.training.ema import MovingAverage


def test_interpolation_scales_the_product_of_a_low_rank_update() -> None:
    model = add_lora(nn.Sequential(OrderedDict(fc1=nn.Linear(3, 3))), TrainConfig(method="lora", lora_rank=2))
    average = MovingAverage(model, 0.0, 0.25)
    with torch.no_grad():
        for parameter in average.parameters.values():
            parameter += 1.0
    average.update(1)

    def update() -> torch.Tensor:
        return model.get_parameter("fc1.lora_B.default.weight") @ model.get_parameter("fc1.lora_A.default.weight")

    whole = update()
    assert whole.norm() > 0
    with average.applied():
        torch.testing.assert_close(update(), whole / 4)
    assert torch.equal(update(), whole)
