"""Reward models and reward mixes."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from textcraftor.config.section import Name, NamedFile, Section

Mix = dict[Name, float]  # reward -> its weight in the loss


class RewardConfig(Section):
    """One reward model. Fields that are None are left out when it is saved, so new optional fields change no digest."""

    kind: str = Field(description="a kind of the library, an entry point's name, or package.module:Class")
    path: NamedFile = Field("", description="weights: folder, file or hub id, as its kind says (docs/rewards.md)")
    head: NamedFile = Field("", description="aesthetic: safetensors file of the linear layers; default PATH/head.safetensors")
    version: str = Field("", description="version of the weights; hpsv2: 2.0 or 2.1, whose scores are not comparable")
    tokenizer: NamedFile = Field("", description="pickscore, imagereward: folder or hub id of the tokenizer; default PATH")
    licence: str = Field("unknown", description="licence of the weights")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision of the model; scores stay float32. None: float32"
    )
    target: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="detail: rms contrast of each octave. None: 0.05, as in a photograph"
    )

    @model_serializer(mode="wrap")
    def _without_unset_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}
