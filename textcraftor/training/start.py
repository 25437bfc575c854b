"""Transfer: a training that starts from tuned encoders in place of the base's.

Only what is tuned starts elsewhere. The frozen encoder, which conditions the steps before the switch, is always the base's, and
so are the prefixes; the rewards, the CLIP constraint among them, see pictures and prompts alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from textcraftor import training_proof
from textcraftor.candidate import Candidate
from textcraftor.config import Config, TrainConfig
from textcraftor.errors import ModelError, Unproven
from textcraftor.models.base import Base, TunedModel, load_candidate
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.signing import Keyring


@dataclass(frozen=True)
class Start:
    """The candidate that a training starts from."""

    candidate: Candidate

    @property
    def inputs(self) -> dict[str, Path]:
        """Its folders, for the proof and for the facts of a run."""
        return {f"start/{part}": path for part, path in self.candidate.parts.items()}

    @property
    def trained_weights(self) -> dict[str, Any] | None:
        """Fingerprints of the rewards that it was trained on; None where its proof does not say."""
        path = next(iter(self.candidate.parts.values())).parent / "proof.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["trained_weights"]
        except (OSError, ValueError, KeyError):
            return None
        return found

    def trained(self, root: Path) -> list[training_proof.Trained]:
        """What its trainings signed; nothing where one of them did not, or not with a key that is believed in `root`."""
        try:
            return training_proof.of_candidate(self.candidate, Keyring(root).believed())
        except Unproven:
            return []

    def modules(self, base: Base, tune: TrainConfig) -> dict[str, nn.Module]:
        """The modules that `tune` trains, by the names of a candidate's folders, float32 and with gradient.

        One that the candidate lacks is the base's.  Raises ModelError for one that it has and `tune` would drop.
        """
        tuned = [*sorted(set(tune.encoders)), *(["negative_embedding"] if tune.negative_embedding else [])]
        if dropped := [part for part in self.candidate.parts if part not in tuned]:
            raise ModelError(
                f"The training starts from {self.candidate.name}, whose {', '.join(dropped)} it would drop: it tunes "
                f"{', '.join(tuned)}. Tune that too (train.encoders, train.negative_embedding), or start from another candidate"
            )
        model = load_candidate(self.candidate, base) or TunedModel()
        given: dict[str, nn.Module | None] = {**model.encoders, "negative_embedding": model.negative_embedding}
        found: dict[str, nn.Module] = {}
        for part in tuned:
            module = given.get(part) or (
                NegativeEmbedding(base.conditioning([""]).prompt_embeds[:1]).to(base.device)
                if part == "negative_embedding"
                else base.trainable(part)
            )
            found[part] = module.requires_grad_(True)
        return found


def find_start(config: Config, mix: str, root: Path) -> Start | None:
    """What the training of a mix starts from, by `curriculum` and `train.start_from`; None for the base.

    Raises ModelError when it is missing, or is a blend of embeddings.
    """
    if mix in config.curriculum:
        candidate = Candidate.find(config.curriculum[mix], root)
    elif config.train.start_from:
        candidate = Candidate.at(Path(config.train.at(root).start_from or ""))
    else:
        return None
    if candidate.blend:
        raise ModelError(f"{candidate.name} is a blend of embeddings. To start from it, save it merged: --space weights")
    return Start(candidate)
