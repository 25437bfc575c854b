"""The recipe from end to end: `build` trains whatever is missing and puts it on the shelf."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from open_clip.model import CLIP
from transformers import CLIPTextModel

from textcraftor.errors import UserError, unknown
from textcraftor.tiny.recipe import aesthetic, contrast, preferences, shelf, towers, unet, vae
from textcraftor.tiny.recipe.card import write_card
from textcraftor.tiny.recipe.contrast import Diet, train_contrast
from textcraftor.tiny.recipe.files import folder_aside
from textcraftor.tiny.recipe.fit import Schedule
from textcraftor.tiny.recipe.preferences import GROUP_H, GROUP_P, train_preferences
from textcraftor.tiny.recipe.tokenizer import new_tokenizer

BASE_TEXT: Final = {"layers": 3, "width": 128, "heads": 4, "mlp_ratio": 4.0}
BASE_DIET: Final = Diet(rich=unet.RICH, wrong=unet.WRONG)
# Every model has its own seed, so that no two saw the same pictures.
MODELS: Final = ("vae", "text_encoder", "unet", "clip", "hpsv2", "pickscore", "heldout", "aesthetic", "vae_decoder")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each model learns; the defaults made what ships."""

    pictures: int = unet.PICTURES
    judged: int = 512
    vae_things: Schedule = vae.SECOND_SCHEDULE
    decoder: Schedule = vae.DECODER_SCHEDULE
    vae: Schedule = vae.SCHEDULE
    text_encoder: Schedule = field(default_factory=lambda: replace(contrast.SCHEDULE, steps=900))
    unet_at_last: Schedule = unet.THIRD_SCHEDULE
    unet_again: Schedule = unet.SECOND_SCHEDULE
    unet: Schedule = unet.SCHEDULE
    towers: Schedule = contrast.SCHEDULE
    settling: Schedule = contrast.SETTLING
    preferences: Schedule = preferences.SCHEDULE
    aesthetic: Schedule = aesthetic.SCHEDULE


class Workshop:
    """One run of the recipe: where things lie, and how each is made from what must be there before it."""

    def __init__(self, out: Path, work: Path, seed: int, device: torch.device, plan: Plan) -> None:
        self.out, self.work, self.seed, self.device, self.plan = out, work, seed, device, plan
        self.tokenizer = new_tokenizer()

    def seed_of(self, name: str) -> int:
        seed = self.seed + MODELS.index(name)
        torch.manual_seed(seed)
        return seed

    def vae(self) -> AutoencoderKL:
        """The autoencoder: trained if need be, else as it lies in the work folder."""
        folder = self.work / "vae"
        if not folder.exists():
            seed = self.seed_of("vae")
            model = vae.new_vae().to(self.device)
            vae.train_vae(model, self.work, seed, self.plan.vae, self.plan.vae_things)
            with folder_aside(folder) as aside:
                model.save_pretrained(aside)
        loaded: AutoencoderKL = AutoencoderKL.from_pretrained(folder).to(self.device).eval()
        return loaded.requires_grad_(False)

    def text_encoder(self) -> CLIPTextModel:
        """The base model's own text encoder, trained on the base's diet with eyes that are thrown away."""
        folder = self.work / "text_encoder"
        if not folder.exists():
            seed = self.seed_of("text_encoder")
            encoder = CLIPTextModel(towers.text_config(self.tokenizer, BASE_TEXT, towers.EMBEDDING))
            lesson = self._lesson(towers.BorrowedEyes(encoder, towers.new_open_clip(self.tokenizer)))
            self._contrast("text_encoder", lesson, seed, self.plan.text_encoder, diet=BASE_DIET)
            with folder_aside(folder) as aside:
                encoder.save_pretrained(aside)
        loaded: CLIPTextModel = CLIPTextModel.from_pretrained(folder).to(self.device).eval()
        return loaded.requires_grad_(False)

    def base(self) -> None:
        """The whole pipeline."""
        autoencoder, encoder = self.vae(), self.text_encoder()
        seed = self.seed_of("unet")
        model = unet.new_unet(encoder.config.hidden_size).to(self.device)
        plan = self.plan
        rounds = (plan.unet, plan.unet_again, plan.unet_at_last)
        unet.train_unet(model, encoder, self.tokenizer, autoencoder, self.work, seed, *rounds, plan.pictures)
        vae.train_decoder(autoencoder, self.work, self.seed_of("vae_decoder"), plan.decoder)
        shelf.shelve_base(self.out / "base", autoencoder, encoder, self.tokenizer, model)

    def clip(self) -> None:
        """Plain CLIP: contrast alone, all of the language."""
        model, lesson = self._clip()
        self._shelve_open_clip("clip", model, lesson, towers.VISION, towers.TEXT)

    def hpsv2(self) -> None:
        """As HPSv2: an open_clip model that goes on from plain CLIP and learns group H's choices."""
        model, lesson = self._clip()
        self._prefer("hpsv2", lesson, GROUP_H)
        self._shelve_open_clip("hpsv2", model, lesson, towers.VISION, towers.TEXT)

    def heldout(self) -> None:
        """A judge that no mix may train on: convolutions, other pictures, and it never met the base's autoencoder."""
        seed = self.seed_of("heldout")
        model = towers.new_open_clip(self.tokenizer, towers.HELDOUT_VISION, towers.HELDOUT_TEXT)
        lesson = self._lesson(towers.OpenClipTowers(model))
        self._contrast("heldout", lesson, seed, self.plan.towers)
        self._shelve_open_clip("heldout", model, lesson, towers.HELDOUT_VISION, towers.HELDOUT_TEXT)

    def pickscore(self) -> None:
        """As PickScore: a Hugging Face model that learned group P's choices, after contrastive training of its own."""
        seed = self.seed_of("pickscore")
        model = towers.new_hugging_face(self.tokenizer)
        lesson = self._lesson(towers.HuggingFaceTowers(model))
        self._contrast("pickscore", lesson, seed, self.plan.towers)
        self._prefer("pickscore", lesson, GROUP_P)
        model.logit_scale.data.fill_(lesson.log_scale)
        shelf.shelve_hugging_face(self.out / "rewards/pickscore", model, self.tokenizer)

    def aesthetic(self) -> None:
        """As LAION's predictor: beauty alone."""
        seed = self.seed_of("aesthetic")
        model = aesthetic.Beholder().to(self.device)
        aesthetic.train_beholder(model, self.work / "aesthetic.pt", seed, self.vae(), self.plan.aesthetic)
        shelf.shelve_beholder(self.out / "rewards/aesthetic", model)

    def card(self) -> None:
        """Measure what lies on the shelf; write the model card and the sample sheet."""
        write_card(self.out, self.device, self.plan.judged)

    def _lesson(self, pair: towers.Towers) -> contrast.Lesson:
        return contrast.Lesson(pair).to(self.device)

    def _clip(self) -> tuple[CLIP, contrast.Lesson]:
        """Plain CLIP, from renders and then from what the autoencoder makes of them; trained or taken up again."""
        seed = self.seed_of("clip")
        model = towers.new_open_clip(self.tokenizer)
        lesson = self._lesson(towers.OpenClipTowers(model))
        self._contrast("clip", lesson, seed, self.plan.towers)
        self._contrast("clip_settled", lesson, seed, self.plan.settling, self.vae())
        return model, lesson

    def _contrast(
        self,
        label: str,
        lesson: contrast.Lesson,
        seed: int,
        schedule: Schedule,
        autoencoder: AutoencoderKL | None = None,
        diet: Diet | None = None,
    ) -> None:
        checkpoint = self.work / f"{label}.pt"
        train_contrast(label, lesson, self.tokenizer, diet or Diet(), checkpoint, seed, autoencoder, schedule)

    def _prefer(self, name: str, lesson: contrast.Lesson, taste: preferences.Taste) -> None:
        label, seed, schedule = f"{name}_preferences", self.seed + MODELS.index(name), self.plan.preferences
        checkpoint = self.work / f"{label}.pt"
        train_preferences(label, lesson, self.tokenizer, taste, checkpoint, seed, self.vae(), schedule)

    def _shelve_open_clip(
        self, name: str, model: CLIP, lesson: contrast.Lesson, vision: dict[str, Any], text: dict[str, Any]
    ) -> None:
        model.logit_scale.data.fill_(lesson.log_scale)
        config = towers.open_clip_config(self.tokenizer, vision, text)
        shelf.shelve_open_clip(self.out / "rewards" / name, model, config, self.tokenizer)


STEPS: Final[dict[str, Callable[[Workshop], None]]] = {
    "base": Workshop.base,
    "rewards/clip": Workshop.clip,
    "rewards/pickscore": Workshop.pickscore,
    "rewards/hpsv2": Workshop.hpsv2,
    "rewards/aesthetic": Workshop.aesthetic,
    "rewards/heldout": Workshop.heldout,
    "README.md": Workshop.card,
}


def build(
    out: Path,
    work: Path,
    seed: int = 0,
    device: str = "auto",
    steps: Collection[str] | None = None,
    plan: Plan | None = None,
) -> list[str]:
    """Make everything under `out` that is not there yet; returns the names of what was made.

    out: the shelf (`data/tiny`).  work: checkpoints and caches; a build that was stopped goes on from them, and two
    builds of different steps may share them once the autoencoder is there.  steps: names out of `STEPS`, all if None.
    Raises UserError for an unknown step.
    """
    wanted = list(STEPS) if steps is None else list(steps)
    for name in wanted:
        if name not in STEPS:
            raise UserError(unknown("step", name, STEPS))
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in STEPS if name in wanted and not (out / name).exists()]
    workshop = Workshop(out, work, seed, shelf.pick_device(device), plan or Plan())
    for name in missing:
        STEPS[name](workshop)
    return missing
