import numpy as np
import torch
from PIL import Image

from textcraftor import pictures


def plain(colour, side=64):
    return Image.new("RGB", (side, side), colour)


def test_pictures_of_one_prompt_are_in_one_column():
    image = np.asarray(pictures.side_by_side(["one", "two"], {"base": [plain("red")] * 2, "tuned": [plain("blue")] * 2}))
    x, y = pictures.MARGIN + pictures.LABEL + 5, pictures.MARGIN + 5
    below, right = y + pictures.CELL + pictures.GAP, x + pictures.CELL + pictures.GAP
    assert image[y, x].tolist() == image[y, right].tolist() == [255, 0, 0]
    assert image[below, x].tolist() == image[below, right].tolist() == [0, 0, 255]


def test_prompts_and_labels_are_drawn():
    rows = {"base": [plain("white")]}
    empty = np.asarray(pictures.side_by_side([""], {"": [plain("white")]}))
    labelled = np.asarray(pictures.side_by_side(["a red circle"], rows))
    below = pictures.MARGIN + pictures.CELL + pictures.GAP
    assert (empty == 255).all()
    assert (labelled[below:] < 255).any()  # the prompt
    assert (labelled[:below, : pictures.MARGIN + pictures.LABEL] < 255).any()  # the label


def test_a_caption_is_never_cut(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "multiline_text", lambda pen, at, text, **_: drawn.append(text))
    prompt = "on a grey background, a triangle, turquoise and tiny, on top of a crucifix that looks little and sapphire " * 4
    for cell in (pictures.CELL, 128):
        drawn.clear()
        pictures.side_by_side(["short", prompt], {"base": [plain("red")] * 2}, cell=cell)
        assert " ".join(drawn[1].split()) == prompt.strip()


def test_a_title_is_never_cut(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "multiline_text", lambda pen, at, text, **_: drawn.append(text))
    title, narrow = "balanced in place of original, by strength", plain("red", 188)
    image = pictures.titled(title, narrow)
    (text,) = drawn
    assert " ".join(text.split()) == title
    assert max(map(pictures._font(":bold", pictures.TEXT_SIZE).getlength, text.split("\n"))) <= 188 - 2 * pictures.MARGIN
    assert image.width == 188
    assert image.height - 188 >= pictures.MARGIN + (text.count("\n") + 1) * pictures.TEXT_SIZE


def test_captions_of_narrow_columns_stay_within_them():
    prompts = ["", "W" * 30 + " MMMM WWWW MMMM " + "雪" * 40]
    image = np.asarray(pictures.side_by_side(prompts[::-1], {"": [plain("white")] * 2}, cell=128))
    assert (image[:, pictures.MARGIN + pictures.LABEL + 128 + pictures.GAP :] == 255).all()
    assert (image < 255).any()


def test_any_prompt_can_be_drawn():
    prompts = ["costs $5 or $6_{x}", "雪の中の猫 " * 20, "x" * 500, "\u202egnp.exe", "two\nlines\there", "👩🏽‍🚀", ""]
    pictures.side_by_side(prompts, {"base": [plain("red")] * len(prompts)})


def test_equal_pictures_give_equal_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        pictures.save(pictures.side_by_side(["a"], {"base": [plain("red")]}), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_picture_has_the_pixels_of_its_tensor_and_only_large_ones_shrink():
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    assert torch.equal(torch.from_numpy(np.array(pictures.picture(image))).permute(2, 0, 1), image)
    assert pictures.picture(torch.zeros(3, 512, 512, dtype=torch.uint8), 256).size == (256, 256)
    assert pictures.picture(torch.zeros(3, 64, 64, dtype=torch.uint8), 256).size == (64, 64)


def test_claims_are_ticked_below_their_own_picture():
    ticks = {"base": [[("red", True)], [("red", False)]]}
    image = np.asarray(pictures.side_by_side(["", ""], {"base": [plain("white")] * 2}, ticks)).astype(int)
    second = pictures.MARGIN + pictures.LABEL + pictures.CELL + pictures.GAP

    def drawn(part, colour):
        return bool((np.abs(part - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(2) < 8).any())

    left, right = image[pictures.MARGIN + pictures.CELL :, :second], image[pictures.MARGIN + pictures.CELL :, second:]
    assert drawn(left, pictures.HOLDS)
    assert drawn(right, pictures.FAILS)
    assert not drawn(left, pictures.FAILS)
    assert not drawn(right, pictures.HOLDS)


def test_many_claims_stay_within_their_column():
    ticks = {"base": [[(f"claim {number}", True) for number in range(12)], []]}
    image = np.asarray(pictures.side_by_side(["", ""], {"base": [plain("white")] * 2}, ticks))
    second = pictures.MARGIN + pictures.LABEL + pictures.CELL + pictures.GAP
    assert (image[pictures.MARGIN + pictures.CELL :, second:] == 255).all()
    assert (image[pictures.MARGIN + pictures.CELL :, :second] < 255).any(1).sum() > 2 * pictures.TICK_SIZE


def test_pictures_become_a_tensor_and_back():
    images = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pictures.to_tensor([pictures.picture(image) for image in images]), images)


def test_stacked_pictures_stand_below_each_other():
    image = np.asarray(pictures.stack([plain("red", 4), plain("blue", 8)]))
    assert image.shape == (12, 8, 3)
    assert (image[4:] == [0, 0, 255]).all()
