import polars as pl
import pytest
import torch

from tests.evaluate.conftest import IMAGES, PROMPTS, write_params
from textcraftor.config import load
from textcraftor.errors import ModelError, PromptError
from textcraftor.evaluate.batches import Batches
from textcraftor.evaluate.generation import from_bytes, generate_images, plan
from textcraftor.pictures import to_bytes
from textcraftor.prompts.table import noise_seed


def test_plan_gives_each_image_of_each_prompt_its_own_noise(config, root):
    rows = plan(config, root)
    assert rows.columns == ["prompt_id", "prompt", "seed", "image_index"]
    assert rows.height == PROMPTS * IMAGES
    assert rows["image_index"].to_list() == list(range(IMAGES)) * PROMPTS
    assert rows["seed"].to_list() == [noise_seed(*key) for key in rows.select("prompt_id", "image_index").iter_rows()]
    assert rows["seed"].n_unique() == rows.height


def test_plan_takes_the_first_prompts(root):
    rows = plan(load(write_params(root, prompts=3)), root)
    assert rows["prompt_id"].unique(maintain_order=True).to_list() == sorted(rows["prompt_id"].unique())
    assert rows.height == 3 * IMAGES


def test_plan_reports_when_there_are_fewer_prompts(root, capsys):
    rows = plan(load(write_params(root, prompts=100)), root)
    assert rows.height == PROMPTS * IMAGES
    assert f"only {PROMPTS} prompts are held out" in " ".join(capsys.readouterr().err.split())


def test_plan_needs_two_prompts(root):
    with pytest.raises(PromptError, match="at least 2 held-out prompts, got 1"):
        plan(load(write_params(root, prompts=1)), root)


def by_seed(prompts, seeds, rows):
    """Images whose pixels are their seed."""
    assert len(prompts) == len(seeds) == rows.stop - rows.start
    return torch.stack([torch.full((3, 2, 2), seed / 255) for seed in seeds])


def fake_plan(count):
    return pl.DataFrame({"prompt": [f"prompt {row}" for row in range(count)], "seed": list(range(count))})


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_generation_covers_every_row_in_order_whatever_the_batch(batch_size):
    images = generate_images(fake_plan(7), by_seed, Batches(7, batch_size))
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(7))


def test_generation_passes_the_rows_of_the_plan():
    seen = []

    def record(prompts, seeds, rows):
        seen.append((prompts, rows))
        return by_seed(prompts, seeds, rows)

    generate_images(fake_plan(5), record, Batches(5, 3))
    assert seen == [(["prompt 0", "prompt 1", "prompt 2"], slice(0, 3)), (["prompt 3", "prompt 4"], slice(3, 5))]


def test_generation_names_the_prompt_of_a_broken_image():
    def broken(prompts, seeds, rows):
        images = by_seed(prompts, seeds, rows)
        if 4 in seeds:
            images[seeds.index(4), 0, 1, 1] = float("nan")
        return images

    with pytest.raises(ModelError, match="'prompt 4'"):
        generate_images(fake_plan(6), broken, Batches(6, 3))


def test_bytes_are_rounded_as_in_an_image_file():
    images = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_bytes(images)[0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(from_bytes(every)), every)
