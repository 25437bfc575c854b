"""Downloads of `textcraftor fetch`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from textcraftor.config.section import NamedFile, Positive, Section

Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class Download(Section):
    """Files that `textcraftor fetch` downloads into the folder `to`, from a hub repository or a URL."""

    to: NamedFile = Field(description="folder in the workspace, as named by the base, a reward or a prompt source")
    hub: str = Field("", description="hub repository, owner/name; instead of url")
    revision: Annotated[str, Field(pattern=r"^([0-9a-f]{40})?$")] = Field(
        "", description="full commit hash of the hub repository; a branch could change"
    )
    url: str = Field("", description="address of a single file; instead of hub")
    files: dict[str, Sha256] = Field(
        min_length=1,
        description="file -> sha256. Empty: recorded in weights.lock.json at the first fetch and checked from then on",
    )
    megabytes: Positive = Field(1, description="approximate size of all files together")
    licence: str = Field("unknown", description="licence of the files")

    @model_validator(mode="after")
    def _one_origin(self) -> "Download":
        if bool(self.hub) == bool(self.url):
            raise ValueError(f"give either hub (with revision) or url, got hub {self.hub!r} and url {self.url!r}")
        if self.hub and not self.revision:
            raise ValueError(f"{self.hub} needs its revision: the 40 digits of a commit")
        if self.url and len(self.files) != 1:
            raise ValueError(f"a url is one file, got {len(self.files)} files")
        for path in (self.to, *self.files):
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{path!r} must stay inside the workspace: relative, without '..'")
        return self
