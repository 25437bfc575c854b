"""Low-rank updates and the negative embedding, from training to sampling with the candidate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import CHAIN
from tests.training.test_stages import CPU, contents, run
from textcraftor.cache.prepare import prepare
from textcraftor.candidate import Candidate
from textcraftor.chain.sampler import Sampler
from textcraftor.config import Config, TrainConfig, TuneConfig
from textcraftor.errors import ModelError
from textcraftor.models.base import Base, TunedModel, load_base, load_candidate
from textcraftor.models.lora import add_lora, merge_lora
from textcraftor.models.negative_embedding import NegativeEmbedding
from textcraftor.rewards import load_rewards
from textcraftor.training import stages
from textcraftor.training.stages import train_text_encoder, train_unet

__all__ = ["run"]  # the fixture
PROMPTS = ["a small red circle", "a large blue square"]


def settings(run: Config, **train: Any) -> Config:
    return run.model_copy(update={"train": TrainConfig.model_validate({**run.train.model_dump(), **train})})


def sample(config: Config, name: str, root: Path) -> torch.Tensor:
    base = load_base(config.base, CPU)
    return Sampler(base, config.chain, 0.4).generate(PROMPTS, [1, 2], load_candidate(Candidate.find(name, root), base))


@pytest.mark.parametrize("module", ["text_encoder", "unet"])
def test_a_low_rank_update_starts_at_zero_and_only_it_is_trained(base: Base, module: str) -> None:
    model = add_lora(base.trainable(module), TuneConfig(lora_rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < sum(p.numel() for p in model.parameters()) / 2
    sampler = Sampler(base, CHAIN, 0.4)
    assert torch.equal(sampler.generate(PROMPTS, [1, 2], TunedModel(**{module: model})), sampler.generate(PROMPTS, [1, 2]))


def test_a_merged_update_is_plain_weights_with_the_same_output(base: Base, tmp_path: Path) -> None:
    model = add_lora(base.trainable("text_encoder"), TuneConfig(lora_rank=2, lora_alpha=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    plain = merge_lora(model, tmp_path / "lora")
    assert plain.state_dict().keys() == base.text_encoder.state_dict().keys()
    update = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert update and all("lora_" in name for name in update)
    ours, theirs = (base.conditioning(PROMPTS, TunedModel(m)).prompt_embeds for m in (plain, model))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, base.conditioning(PROMPTS).prompt_embeds, atol=1e-3)
    assert any("lora_" in name for name, _ in model.named_parameters()), "what is trained on is not touched"


def test_a_low_rank_candidate_is_trained_loaded_and_sampled(run: Config, tmp_path: Path) -> None:
    run = settings(run, method="lora", lora_rank=2)
    run = run.model_copy(update={"train_unet": run.train_unet.model_copy(update={"method": "lora", "lora_rank": 2})})
    prepare(run, tmp_path, CPU)
    made = contents(train_text_encoder(run, "redder", tmp_path, CPU))
    assert {"text_encoder/model.safetensors", "lora/text_encoder/adapter_model.safetensors"} <= made.keys()
    assert contents(train_text_encoder(run, "redder", tmp_path, CPU)) == made, "the same bytes again"
    assert not torch.equal(sample(run, "redder", tmp_path), sample(run, "base", tmp_path))
    train_unet(run, "redder", tmp_path, CPU)
    assert not torch.equal(sample(run, "redder-unet", tmp_path), sample(run, "redder", tmp_path))


def test_a_negative_embedding_alone_is_a_candidate(run: Config, tmp_path: Path) -> None:
    run = settings(run, encoders=[], negative_embedding=True, negative_learning_rate=0.5)
    prepare(run, tmp_path, CPU)
    out = train_text_encoder(run, "redder", tmp_path, CPU)
    assert not (out / "text_encoder").exists()
    candidate = Candidate.find("redder", tmp_path)
    assert candidate.digest and candidate.parts == {"negative_embedding": out / "negative_embedding"}
    learned = load_file(out / "negative_embedding/model.safetensors")["negative_prompt_embeds"]
    base = load_base(run.base, CPU)
    empty = base.conditioning([""]).prompt_embeds[:1]
    assert learned.shape == empty.shape and (learned - empty).abs().max() > 0.1
    assert not torch.equal(sample(run, "redder", tmp_path), sample(run, "base", tmp_path))
    tuned = load_candidate(candidate, base)
    assert tuned is not None
    ours, frozen = (base.conditioning(PROMPTS, model).prompt_embeds for model in (tuned, None))
    assert torch.equal(ours[:2], learned.expand(2, -1, -1)) and torch.equal(ours[2:], frozen[2:])


def test_encoder_and_negative_embedding_are_tuned_together(run: Config, tmp_path: Path) -> None:
    run = settings(run, negative_embedding=True)
    prepare(run, tmp_path, CPU)
    out = train_text_encoder(run, "redder", tmp_path, CPU)
    assert Candidate.find("redder", tmp_path).parts.keys() == {"text_encoder", "negative_embedding"}
    digests = json.loads((out / "proof.json").read_text())["weights"]
    assert digests.keys() == {"text_encoder", "negative_embedding"}
    before = Candidate.find("redder", tmp_path).digest
    path = out / "negative_embedding/model.safetensors"
    save_file({"negative_prompt_embeds": load_file(path)["negative_prompt_embeds"] + 1}, path)
    assert Candidate.find("redder", tmp_path).digest != before, "the gate's digest speaks of it too"
    train_unet(run, "redder", tmp_path, CPU)
    assert Candidate.find("redder-unet", tmp_path).parts.keys() == {"text_encoder", "negative_embedding", "unet"}


@pytest.mark.parametrize("fault", ["missing", "truncated", "other tensor", "other base"])
def test_a_negative_embedding_that_does_not_fit_is_refused(base: Base, tmp_path: Path, fault: str) -> None:
    NegativeEmbedding(torch.zeros(1, 40, 16)).save_pretrained(tmp_path / "negative_embedding")
    path = tmp_path / "negative_embedding/model.safetensors"
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif fault == "other tensor":
        save_file({"weight": torch.zeros(1, 40, 16)}, path)
    else:
        save_file({"negative_prompt_embeds": torch.zeros(1, 77, 768)}, path)
    with pytest.raises(ModelError, match="negative"):
        base.conditioning(PROMPTS, load_candidate(Candidate.find(str(tmp_path), Path()), base))


def test_tuning_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nothing is tuned"):
        TrainConfig(encoders=())


def test_rewards_train_in_the_dtype_asked_for(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(stages, "load_rewards", lambda *arguments: loaded.append(load_rewards(*arguments)) or loaded[-1])
    prepare(run, tmp_path, CPU)
    train_text_encoder(settings(run, reward_dtype="bfloat16"), "redder", tmp_path, CPU)
    train_text_encoder(run, "redder", tmp_path, CPU)
    assert [{reward.dtype for reward in each.values()} for each in loaded] == [{torch.bfloat16}, {torch.float32}]


def test_selective_checkpointing_trains_the_same_encoder_bit_for_bit(run: Config, tmp_path: Path) -> None:
    prepare(run, tmp_path, CPU)
    plain, selective = (
        load_file(
            train_text_encoder(settings(run, selective_checkpointing=enabled), "redder", tmp_path, CPU)
            / "text_encoder/model.safetensors"
        )
        for enabled in (False, True)
    )
    assert plain.keys() == selective.keys()
    assert all(torch.equal(selective[name], weight) for name, weight in plain.items())
