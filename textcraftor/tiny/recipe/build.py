"""The recipe from end to end: `build` trains every model that is missing and exports it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from torch import nn
from transformers import CLIPTextModel

from textcraftor.device import choose_device
from textcraftor.errors import UserError, unknown
from textcraftor.tiny.recipe import aesthetic, contrastive, export, preferences, reading, towers, unet, vae
from textcraftor.tiny.recipe.card import write_card
from textcraftor.tiny.recipe.contrastive import CaptionMix, train_contrastive
from textcraftor.tiny.recipe.drawings import Drawings, make_drawings
from textcraftor.tiny.recipe.files import replace_folder
from textcraftor.tiny.recipe.fit import Schedule
from textcraftor.tiny.recipe.preferences import GROUP_H, GROUP_P, train_preferences
from textcraftor.tiny.recipe.tokenizer import new_tokenizer

BASE_TEXT: Final = {"layers": 3, "width": 128, "heads": 4, "mlp_ratio": 4.0}
BASE_CAPTIONS: Final = CaptionMix(rich=0.12, wrong=unet.WRONG_FRACTION)
# A model's seed is the recipe's seed plus its index here: no two models see the same images. Append only.
MODELS: Final = ("vae", "text_encoder", "unet", "clip", "hpsv2", "pickscore", "heldout", "aesthetic", "vae_decoder")


@dataclass(frozen=True, slots=True)
class RecipeSettings:
    """How long each model trains; tests use a few steps.

    training_images: of the UNet.  drawn_prompts, heldout_drawn_prompts: of the two sets of drawings, four images each.
    drawing_steps: of their sampler.  validation_prompts: of the model card's figures.
    """

    training_images: int = unet.TRAINING_IMAGES
    drawn_prompts: int = 2400
    heldout_drawn_prompts: int = 800
    drawing_steps: int = 12
    validation_prompts: int = 512
    autoencoder: Schedule = vae.SCHEDULE
    autoencoder_decoder: Schedule = vae.DECODER_SCHEDULE
    text_encoder: Schedule = field(default_factory=lambda: replace(contrastive.SCHEDULE, steps=900))
    reading: Schedule = reading.SCHEDULE
    unet_last: Schedule = unet.LAST_SCHEDULE
    unet: Schedule = unet.SCHEDULE
    attributes: Schedule = contrastive.ATTRIBUTES_SCHEDULE
    image_attributes: Schedule = contrastive.IMAGES_SCHEDULE
    towers: Schedule = contrastive.SCHEDULE
    fine_tuning: Schedule = contrastive.FINE_TUNING_SCHEDULE
    preferences: Schedule = preferences.SCHEDULE
    aesthetic: Schedule = aesthetic.SCHEDULE

    @classmethod
    def default(cls, device: torch.device) -> "RecipeSettings":
        """Those of a device: a GPU trains the UNet with larger batches in fewer steps."""
        return cls(unet=unet.GPU_SCHEDULE, unet_last=unet.GPU_LAST_SCHEDULE) if device.type == "cuda" else cls()


class RecipeBuilder:
    """One run of the recipe; each method trains one model from its prerequisites and exports it to `out`.

    out: folder of the exported models.  work: folder of checkpoints, caches and intermediate models.
    """

    def __init__(self, out: Path, work: Path, seed: int, device: torch.device, settings: RecipeSettings) -> None:
        self.out, self.work, self.seed, self.device, self.settings = out, work, seed, device, settings
        self.tokenizer = new_tokenizer()

    def seed_torch(self, name: str) -> int:
        """Seed torch's global generator for the named model; returns the model's seed."""
        seed = self.seed + MODELS.index(name)
        torch.manual_seed(seed)
        return seed

    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder before its decoder is fine-tuned, trained if it is not in the work folder."""
        folder = self.work / "vae"
        if not folder.exists():
            seed = self.seed_torch("vae")
            model = vae.new_vae().to(self.device)
            vae.train_vae(model, self.work, seed, self.settings.autoencoder)
            with replace_folder(folder) as temporary:
                model.save_pretrained(temporary)
        loaded: AutoencoderKL = AutoencoderKL.from_pretrained(folder).to(self.device).eval()
        return loaded.requires_grad_(False)

    def text_encoder(self) -> CLIPTextModel:
        """The text encoder before it is trained with the UNet: by contrast, then by reading; trained if it is not in `work`."""
        folder = self.work / "text_encoder"
        if not folder.exists():
            seed = self.seed_torch("text_encoder")
            encoder = CLIPTextModel(towers.text_config(self.tokenizer, BASE_TEXT, towers.EMBEDDING))
            task = self._new_task(towers.TextEncoderTowers(encoder, towers.new_open_clip(self.tokenizer)))
            self._train_contrastive("text_encoder", task, seed, self.settings.text_encoder, captions=BASE_CAPTIONS)
            reading.train_reading(encoder, self.tokenizer, self.work / "reading.pt", seed, self.settings.reading)
            with replace_folder(folder) as temporary:
                encoder.save_pretrained(temporary)
        loaded: CLIPTextModel = CLIPTextModel.from_pretrained(folder).to(self.device)
        return loaded

    def base(self) -> None:
        """The Stable Diffusion pipeline."""
        autoencoder, encoder = self.vae(), self.text_encoder()
        seed = self.seed_torch("unet")
        model = unet.new_unet(encoder.config.hidden_size).to(self.device)
        settings = self.settings
        schedules = settings.unet, settings.unet_last
        unet.train_unet(model, encoder, self.tokenizer, autoencoder, self.work, seed, *schedules, settings.training_images)
        vae.train_decoder(autoencoder, self.work, self.seed_torch("vae_decoder"), settings.autoencoder_decoder)
        export.export_base(self.out / "base", export.new_pipeline(autoencoder, encoder, new_tokenizer(), model))

    def drawings(self, readers: str) -> Drawings:
        """What the base drew at several stages of its training.  readers: "clip", for every reward, or "heldout": a judge
        that nobody trains on sees other prompts and other noise."""
        seed, cache = self.seed + MODELS.index(readers), self.work / f"drawings_{readers}.safetensors"
        prompts = self.settings.heldout_drawn_prompts if readers == "heldout" else self.settings.drawn_prompts
        return make_drawings(self._stages, prompts, self.settings.drawing_steps, seed, cache)

    def _stages(self) -> list[StableDiffusionPipeline]:
        """The base at several stages of its training, with its final decoder."""
        stages = []
        autoencoder = AutoencoderKL.from_pretrained(self.out / "base/vae").to(self.device)
        for part in unet.STAGES:
            encoder = CLIPTextModel.from_pretrained(self.out / "base/text_encoder").to(self.device).eval()
            model = unet.new_unet(encoder.config.hidden_size).to(self.device).eval()
            unet.load_stage(unet.stage_file(self.work, part), model, encoder)
            stages.append(export.new_pipeline(autoencoder, encoder, self.tokenizer, model))
            stages[-1].set_progress_bar_config(disable=True)
        return stages

    def clip(self) -> None:
        """The CLIP reward: contrastive training on the whole language."""
        model, task = self._train_clip()
        self._export_open_clip("clip", model, task, towers.VISION, towers.TEXT)

    def hpsv2(self) -> None:
        """The HPSv2 reward: the CLIP reward fine-tuned on group H's choices."""
        model, task = self._train_clip()
        self._train_preferences("hpsv2", task, GROUP_H)
        self._export_open_clip("hpsv2", model, task, towers.VISION, towers.TEXT)

    def heldout(self) -> None:
        """The held-out judge: another architecture, other renders, other drawings of the base."""
        seed = self.seed_torch("heldout")
        model = towers.new_open_clip(self.tokenizer, towers.HELDOUT_VISION, towers.HELDOUT_TEXT)
        task = self._new_task(towers.OpenClipTowers(model))
        self._train_pair("heldout", task, seed)
        self._train_contrastive("heldout_drawings", task, seed, self.settings.fine_tuning, self.drawings("heldout"))
        self._export_open_clip("heldout", model, task, towers.HELDOUT_VISION, towers.HELDOUT_TEXT)

    def pickscore(self) -> None:
        """The PickScore reward: the CLIP reward fine-tuned on group P's choices, in the format of transformers."""
        model, task = self._train_clip()
        self._train_preferences("pickscore", task, GROUP_P)
        model.logit_scale.data.fill_(task.log_scale)
        export.export_clip_model(
            self.out / "rewards/pickscore", towers.to_clip_model(model.cpu(), self.tokenizer), new_tokenizer()
        )

    def aesthetic(self) -> None:
        """The aesthetic reward: ratings, whatever the prompt."""
        seed = self.seed_torch("aesthetic")
        model = aesthetic.AestheticModel().to(self.device)
        aesthetic.train_aesthetic(model, self.work / "aesthetic.pt", seed, self.vae(), self.settings.aesthetic)
        export.export_aesthetic(self.out / "rewards/aesthetic", model)

    def card(self) -> None:
        """The model card and the sample sheet, from measurements of the exported models."""
        write_card(self.out, self.device, self.settings.validation_prompts)

    def _new_task(self, pair: towers.Towers) -> contrastive.ContrastiveTask:
        return contrastive.ContrastiveTask(pair).to(self.device)

    def _train_clip(self) -> tuple[CLIP, contrastive.ContrastiveTask]:
        """CLIP trained on renders, then fine-tuned on renders and drawings; resumed where possible."""
        seed = self.seed_torch("clip")
        model = towers.new_open_clip(self.tokenizer)
        task = self._new_task(towers.OpenClipTowers(model))
        self._train_pair("clip", task, seed, model.visual)
        self._train_contrastive("clip_drawings", task, seed, self.settings.fine_tuning, self.drawings("clip"))
        return model, task

    def _train_pair(
        self, label: str, task: contrastive.ContrastiveTask, seed: int, image_tower: nn.Module | None = None
    ) -> None:
        """Train new towers: on attributes, the given image tower then on those of images alone, at last all by contrast."""
        checkpoint = self.work / f"{label}_attributes.pt"
        contrastive.train_attributes(f"{label}_attributes", task, self.tokenizer, checkpoint, seed, self.settings.attributes)
        if image_tower is not None:
            checkpoint, schedule = self.work / f"{label}_images.pt", self.settings.image_attributes
            contrastive.train_image_attributes(f"{label}_images", task, image_tower, checkpoint, seed, schedule)
        self._train_contrastive(label, task, seed, self.settings.towers)

    def _train_contrastive(
        self,
        label: str,
        task: contrastive.ContrastiveTask,
        seed: int,
        schedule: Schedule,
        drawings: Drawings | None = None,
        captions: CaptionMix | None = None,
    ) -> None:
        checkpoint = self.work / f"{label}.pt"
        train_contrastive(label, task, self.tokenizer, captions or CaptionMix(), checkpoint, seed, drawings, schedule)

    def _train_preferences(self, name: str, task: contrastive.ContrastiveTask, group: preferences.AnnotatorGroup) -> None:
        label, seed, schedule = f"{name}_preferences", self.seed + MODELS.index(name), self.settings.preferences
        checkpoint, drawings = self.work / f"{label}.pt", self.drawings("clip")
        train_preferences(label, task, self.tokenizer, group, checkpoint, seed, drawings, self.vae(), schedule)

    def _export_open_clip(
        self, name: str, model: CLIP, task: contrastive.ContrastiveTask, vision: dict[str, Any], text: dict[str, Any]
    ) -> None:
        model.logit_scale.data.fill_(task.log_scale)
        config = towers.open_clip_config(self.tokenizer, vision, text)
        export.export_open_clip(self.out / "rewards" / name, model, config, new_tokenizer())


STEPS: Final[dict[str, Callable[[RecipeBuilder], None]]] = {
    "base": RecipeBuilder.base,
    "rewards/clip": RecipeBuilder.clip,
    "rewards/pickscore": RecipeBuilder.pickscore,
    "rewards/hpsv2": RecipeBuilder.hpsv2,
    "rewards/aesthetic": RecipeBuilder.aesthetic,
    "rewards/heldout": RecipeBuilder.heldout,
    "README.md": RecipeBuilder.card,
}


def build(
    out: Path,
    work: Path,
    seed: int = 0,
    device: str = "auto",
    steps: Collection[str] | None = None,
    settings: RecipeSettings | None = None,
) -> list[str]:
    """Build everything under `out` that does not exist yet; returns the names of the steps that ran.

    out: folder of the exported models (`data/tiny`).  work: checkpoints and caches; an interrupted build resumes from
    them, and two builds of different steps may share them once the autoencoder exists.  steps: names from `STEPS`, None
    for all.  Raises UserError for an unknown step, ModelError for a device that torch does not have.
    """
    selected = list(STEPS) if steps is None else list(steps)
    for name in selected:
        if name not in STEPS:
            raise UserError(unknown("step", name, STEPS))
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in STEPS if name in selected and not (out / name).exists()]
    chosen = choose_device(device)
    builder = RecipeBuilder(out, work, seed, chosen, settings or RecipeSettings.default(chosen))
    for name in missing:
        STEPS[name](builder)
    return missing
