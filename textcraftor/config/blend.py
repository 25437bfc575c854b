"""Weights of a blend of text encoders: c = sum_k w_k E_k(p), the weights summing to 1 (paper figures 4 and 5).

Written NAME=WEIGHT, or NAME=WEIGHT@FROM..TO for a part of the chain only, in fractions of its steps. NAME is `original` for the
base's own encoders, or a candidate. Weights beyond 0..1 extrapolate. Steps before the switch are the original's.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field, field_validator

from textcraftor.config.base import switch_step
from textcraftor.config.section import Section
from textcraftor.errors import ConfigError, unknown

ORIGINAL: Final = "original"
TOLERANCE: Final = 1e-6  # of the sum of the weights
_TERM: Final = re.compile(r"(?P<name>[^\s=@]+)=(?P<weight>[^\s=@]*)(@(?P<start>[^\s.]*(\.\d+)?)\.\.(?P<end>\S*))?")


def is_term(text: str) -> bool:
    """Whether a word has the form NAME=WEIGHT, so that it is no prompt."""
    return _TERM.fullmatch(text) is not None


@dataclass(frozen=True)
class Term:
    """The weight of one encoder, in the steps from fraction `start` of the chain up to, and without, fraction `end`."""

    name: str
    weight: float
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Term":
        """Read NAME=WEIGHT or NAME=WEIGHT@FROM..TO. Raises ConfigError."""
        found = _TERM.fullmatch(text)
        if found is None:
            raise ConfigError(f"{text!r} is no weight. Write NAME=WEIGHT, such as balanced=0.5, or NAME=WEIGHT@FROM..TO")
        try:
            term = cls(found["name"], float(found["weight"]), float(found["start"] or 0), float(found["end"] or 1))
        except ValueError:
            raise ConfigError(
                f"{text!r} is no weight: a number is missing or no number. Write, for instance, balanced=0.5"
            ) from None
        return term

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(
                f"The weight of {self.name} is {self.weight}. Give a finite number; 0 is the original's style, 1 its own"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"{self}: {self.start:g}..{self.end:g} is no part of the chain. Give fractions of its steps, such as 0.4..0.7"
            )

    def __str__(self) -> str:
        span = "" if (self.start, self.end) == (0, 1) else f"@{self.start:g}..{self.end:g}"
        return f"{self.name}={self.weight!r}{span}"


@dataclass(frozen=True)
class Weights:
    """The terms of a blend."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Weights":
        """Read terms as they are written. Raises ConfigError."""
        return cls(tuple(map(Term.parse, texts)))

    @classmethod
    def of(cls, weights: "Weights | Mapping[str, Any] | Iterable[str]") -> "Weights":
        """From a mapping of names to numbers (or to WEIGHT@FROM..TO), or from written terms. Raises ConfigError."""
        if isinstance(weights, Weights):
            return weights
        if isinstance(weights, Mapping):
            return cls.parse(f"{name}={value}" for name, value in weights.items())
        return cls.parse(weights)

    @classmethod
    def between(cls, name: str, strength: float) -> "Weights":
        """`strength` of an encoder, the rest of the original: 0 is the base, 1 the encoder itself."""
        return cls((Term(ORIGINAL, 1 - strength), Term(name, strength)))

    def __post_init__(self) -> None:
        if not self.terms:
            raise ConfigError("A blend needs weights, such as: original=0.5 balanced=0.5")

    @property
    def names(self) -> list[str]:
        """The encoders that are named, in order, once each."""
        return list(dict.fromkeys(term.name for term in self.terms))

    @property
    def extrapolates(self) -> str:
        """The terms beyond 0..1, written; empty where the blend lies between its encoders."""
        return " ".join(str(term) for term in self.terms if not 0 <= term.weight <= 1)

    def __str__(self) -> str:
        return " ".join(map(str, self.terms))

    def require_known(self, known: Iterable[str]) -> None:
        """Raises ConfigError for a name that is neither `original` nor one of `known`."""
        known = [ORIGINAL, *known]
        for name in self.names:
            if name not in known:
                raise ConfigError(unknown("encoder", name, known))

    def stages(self, first_step: int, num_inference_steps: int) -> list[tuple[int, dict[str, float]]]:
        """(first step, {name: weight}) for each stretch of steps with equal weights; the first begins at `first_step`.

        Encoders of weight 0 are left out, so a blend that is one encoder costs and gives what that encoder does.
        Raises ConfigError where the weights of a step do not sum to 1.
        """
        spans = [
            (switch_step(term.start, num_inference_steps), switch_step(term.end, num_inference_steps)) for term in self.terms
        ]
        borders = {first_step, *(border for span in spans for border in span if first_step < border < num_inference_steps)}
        found: list[tuple[int, dict[str, float]]] = []
        for border in sorted(borders):
            weights: dict[str, float] = {}
            for term, (start, end) in zip(self.terms, spans, strict=True):
                if start <= border < end or (border >= num_inference_steps == end):
                    weights[term.name] = weights.get(term.name, 0.0) + term.weight
            self._require_sum(weights, border, num_inference_steps)
            weights = {name: weight for name, weight in weights.items() if weight}
            if not found or found[-1][1] != weights:
                found.append((border, weights))
        return found

    def _require_sum(self, weights: Mapping[str, float], step: int, num_inference_steps: int) -> None:
        total = math.fsum(weights.values())
        if abs(total - 1) <= TOLERANCE:
            return
        ranged = any((term.start, term.end) != (0, 1) for term in self.terms)
        where = f" from step {step} of {num_inference_steps} on" if ranged else ""
        rest = 1 - total + weights.get(ORIGINAL, 0)
        raise ConfigError(
            f"The weights {self} sum to {total:g}{where}, and must sum to 1. "
            f"To fill up with the base's own encoder, give it {ORIGINAL}={rest:g}"
        )


class BlendConfig(Section):
    """A blend that is a candidate like any other. Its parts are the original and mixes of the run."""

    weights: tuple[str, ...] = Field(
        description="encoder: weight, or encoder: WEIGHT@FROM..TO for a part of the chain, or a list of NAME=WEIGHT@FROM..TO; "
        "`original` is the base's own encoder"
    )
    space: Literal["embeddings", "weights"] = Field(
        "embeddings",
        description="what is blended. embeddings: what the encoders say of a prompt, each run once (paper figures 4 and 5). "
        "weights: the encoders' weights, merged into a single encoder, which costs nothing more when drawing",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _are_weights(cls, weights: Any) -> tuple[str, ...]:
        if not isinstance(weights, Mapping | list | tuple):
            raise ValueError(f"weights are a mapping such as {{original: 0.5, balanced: 0.5}}, got {weights!r}")
        try:
            return tuple(map(str, Weights.of(weights).terms))
        except ConfigError as error:
            raise ValueError(str(error)) from None
