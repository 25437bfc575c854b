"""Reward models, and the mixes made of them."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from textcraftor.config.section import Name, NamedFile, Section

Mix = dict[Name, float]


class RewardConfig(Section):
    """One reward model: its kind names the class, its path the weights.

    What is None is not written anywhere: a reward that does not use a field reads the same with and without it.
    """

    kind: str
    path: NamedFile = ""
    head: NamedFile = Field("", description="aesthetic: the linear stack's safetensors; default PATH/head.safetensors")
    version: str = Field("", description="of the weights; hpsv2: 2.0 or 2.1, which are not comparable")
    tokenizer: NamedFile = Field("", description="pickscore, imagereward: folder or hub id of the tokenizer; default PATH")
    licence: str = Field("unknown", description="of the weights")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="the towers compute in it, scores stay float32; None: float32"
    )
    target: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="detail: rms contrast of each octave; None: 0.05, a photograph's"
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}
