"""Drawing for requests: what a request may ask for, and pictures for a batch of them."""

import base64
import io
from collections.abc import Sequence
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from textcraftor import pictures
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import ORIGINAL, Config, Weights
from textcraftor.errors import ConfigError, ModelError
from textcraftor.generate import not_finite
from textcraftor.models.base import TunedModel, load_base
from textcraftor.models.blended import BlendedModel, load_model

BATCH: Final = 8  # pictures drawn at once
MOST: Final = 16  # prompts in one call
TUNED: Final = "tuned"


class Request(BaseModel):
    """One picture to draw. What is None is as the model was judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"\S")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int | None, Field(ge=2, le=100, description="of the chain")] = None
    guidance: Annotated[float | None, Field(ge=1, le=30, description="guidance scale")] = None
    strength: Annotated[float, Field(ge=0, le=1, description="of the tuned encoder; 0 draws with the base alone")] = 1.0

    @classmethod
    def read(cls, asked: object) -> "Request":
        """Raises ConfigError, naming each field that is wrong."""
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the request'}: {each['msg']}" for each in error.errors())
            raise ConfigError(f"The request cannot be drawn: {wrong}. Known fields: {', '.join(cls.model_fields)}") from None


class Service:
    """A candidate on its base, in memory."""

    def __init__(self, config: Config, candidate: Candidate, device: torch.device) -> None:
        self.config, self.base = config, load_base(config.base, device)
        self.model = load_model(candidate, self.base)

    def draw(self, requests: Sequence[Request]) -> list[bytes]:
        """A PNG for each request. Those with equal settings are drawn together; order and batch change no picture's noise.

        Raises ModelError for a picture that is not finite, ConfigError for a strength that this model does not take.
        """
        drawn: dict[int, bytes] = {}
        groups: dict[Request, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.model_copy(update={"prompt": "", "seed": 0}), []).append(index)
        for settings, indices in groups.items():
            for start in range(0, len(indices), BATCH):
                batch = indices[start : start + BATCH]
                drawn.update(zip(batch, self._draw(settings, [requests[index] for index in batch]), strict=True))
        return [drawn[index] for index in range(len(requests))]

    def _draw(self, settings: Request, requests: Sequence[Request]) -> list[bytes]:
        chain = self.config.chain
        asked = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
        chain = chain.model_copy(update={name: value for name, value in asked.items() if value is not None})
        sampler = Sampler(self.base, chain, self.config.sampler.switch_at)
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        images = sampler.generate(prompts, seeds, self._blended(settings.strength))
        if not images.isfinite().all():
            raise ModelError(not_finite(prompts[0]))
        return [_png(image) for image in pictures.to_bytes(images)]

    def _blended(self, strength: float) -> TunedModel | BlendedModel | None:
        if strength == 1 or self.model is None:
            return self.model
        if strength == 0:
            return None
        if isinstance(self.model, BlendedModel) or self.model.unet:
            raise ConfigError("This model is a blend or has a UNet of its own; strength may be 0 or 1")
        return BlendedModel({ORIGINAL: None, TUNED: self.model}, Weights.between(TUNED, strength))

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """MLflow's call: prompts as a table with a column `prompt`, a list or a string; PNGs in base64.

        params: `seed` (of the first prompt; the next ones count up), `steps`, `guidance`, `strength`.  Raises ConfigError.
        """
        prompts = _prompts(model_input)
        if not 1 <= len(prompts) <= MOST:
            raise ConfigError(f"{len(prompts)} prompts in one call. Give 1 to {MOST}")
        settings = {name: value for name, value in (params or {}).items() if value is not None}
        seed = Request.read({"prompt": prompts[0], **settings}).seed
        requests = [
            Request.read({**settings, "prompt": prompt, "seed": (seed + index) % 2**63}) for index, prompt in enumerate(prompts)
        ]
        return [base64.b64encode(each).decode() for each in self.draw(requests)]


def _prompts(model_input: Any) -> list[Any]:
    if hasattr(model_input, "columns"):
        if "prompt" not in model_input.columns:
            raise ConfigError(f"A table needs the column `prompt`. Got: {', '.join(map(str, model_input.columns))}")
        cells = model_input["prompt"].tolist()  # MLflow makes one cell of a list that it is given
        return [
            prompt for cell in cells for prompt in ([cell] if isinstance(cell, str) or not hasattr(cell, "__len__") else cell)
        ]
    if isinstance(model_input, dict):
        model_input = model_input.get("prompt", [])
    return list(model_input) if isinstance(model_input, list | tuple) else [model_input]


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    pictures.picture(image).save(buffer, "PNG")
    return buffer.getvalue()
