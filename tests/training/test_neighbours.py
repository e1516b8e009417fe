"""Rewards of other papers, expressed by configuration, trained and loaded; frozen, 4-bit and encoder-less training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.likelihood import BradleyTerryModel, ThurstoneModel
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.training import LatentRewardTrainer
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.bucketed import embedded_rows
from tests.training.tiny_reward import separable_pairs, tiny_reward, training_config


LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"])
BRADLEY_TERRY: dict[str, Any] = {"loss_type": "bradley_terry"}
DIT_REWARD: dict[str, Any] = {
    **BRADLEY_TERRY, "level_distribution": "constant", "level_value": 0.005, "eval_noise_levels": [0.005]
}  # fmt: skip


def neighbour(pipeline: Any, kind: str, likelihood: str = "bradley_terry", **options: Any) -> LatentReward:
    config = LatentRewardConfig(
        family="sd3",
        num_layers=2,
        visual_taps=(1, 2),
        max_sequence_length=8,
        head=RewardHeadConfig(kind=kind, width=16, num_attention_heads=4),  # type: ignore[arg-type]
        likelihood=likelihood,  # type: ignore[arg-type]
    )
    return LatentReward.from_config(config, pipeline=pipeline, lora_config=LORA, **options)


def trainer_of(reward: LatentReward, directory: Path, rows: Any = None, **arguments: Any) -> LatentRewardTrainer:
    defaults = {"max_steps": 30, "learning_rate": 1e-2, "eval_noise_levels": [0.1]}
    return LatentRewardTrainer(
        reward,
        training_config(directory, **{**defaults, **arguments}),
        train_dataset=separable_pairs() if rows is None else rows,
        eval_dataset=separable_pairs(24, seed=1) if rows is None else rows,
    )


@pytest.mark.parametrize(
    ("kind", "arguments"), [("pooled", DIT_REWARD), ("conv", {**BRADLEY_TERRY, "eval_ensemble_levels": [0.1, 0.5]})]
)
def test_other_heads_learn_and_load(tmp_path: Path, sd3_pipeline: Any, kind: str, arguments: dict[str, Any]) -> None:
    trainer = trainer_of(neighbour(sd3_pipeline, kind), tmp_path, **arguments)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.9
    assert after["eval_brier"] < 0.1 < before["eval_brier"]
    trainer.save_model(str(tmp_path / "reward"))
    loaded = LatentReward.from_pretrained(tmp_path / "reward", pipeline=sd3_pipeline)
    latents = separable_pairs(4).chosen
    for options in (
        {"noise_level": 0.1},
        {"noise_level": [0.1, 0.4]},
        {"noise_level": [0.1, 0.4], "ensemble": "mean"},
    ):
        expected = trainer.reward.eval()(latents, "a red circle", seed=0, **options)
        torch.testing.assert_close(loaded(latents, "a red circle", seed=0, **options), expected)


def test_near_clean_level_snaps_to_the_grid(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = trainer_of(neighbour(sd3_pipeline, "pooled"), tmp_path, **DIT_REWARD)
    noised = trainer.noiser(torch.zeros(3, 16, 8, 8), torch.zeros(3, 16, 8, 8), step=0, first_position=0)
    expected = 3 * 0.002 / (1 + 2 * 0.002)  # shift 3, second smallest of 1000 levels
    assert noised.point.level.tolist() == pytest.approx([expected] * 3, abs=1e-6)
    assert noised.latents.std().item() == pytest.approx(expected, rel=0.1)


def test_likelihood_is_saved_and_used(tmp_path: Path, sd3_pipeline: Any) -> None:
    reward = neighbour(sd3_pipeline, "pooled")
    assert reward.preference_model == BradleyTerryModel()
    reward.save_pretrained(tmp_path / "reward")
    loaded = LatentReward.from_pretrained(tmp_path / "reward", pipeline=sd3_pipeline)
    assert loaded.config.likelihood == "bradley_terry"
    a, b = separable_pairs(3).chosen, separable_pairs(3).rejected
    margin = loaded(a, "x", seed=1) - loaded(b, "x", seed=1)
    torch.testing.assert_close(loaded.preference(a, b, "x", seed=1), margin.sigmoid())


def test_checkpoints_without_a_likelihood_are_thurstone(tmp_path: Path, sd3_pipeline: Any) -> None:
    tiny_reward(pipeline=sd3_pipeline).save_pretrained(tmp_path / "reward")
    path = tmp_path / "reward" / "config.json"
    values = json.loads(path.read_text())
    for key in ("kind", "use_time_embedding", "num_hidden_layers"):
        values["head"].pop(key)
    assert values.pop("likelihood") == "thurstone"
    values["sha256"].pop("config.json")
    path.write_text(json.dumps(values))
    loaded = LatentReward.from_pretrained(tmp_path / "reward", pipeline=sd3_pipeline)
    assert loaded.preference_model == ThurstoneModel(2.0, 0.05)
    assert loaded.config.head.kind == "query"


@pytest.mark.parametrize(
    ("likelihood", "loss_type", "advice"),
    [
        (
            "thurstone",
            "bradley_terry",
            "set loss_type to 'thurstone_fidelity', 'thurstone_nll', 'gaussian', or likelihood=",
        ),
        ("bradley_terry", "thurstone_nll", "set loss_type to 'bradley_terry', or likelihood='thurstone'"),
    ],
)
def test_a_loss_of_another_likelihood_is_refused(
    tmp_path: Path, sd3_pipeline: Any, likelihood: str, loss_type: str, advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        trainer_of(neighbour(sd3_pipeline, "pooled", likelihood), tmp_path, loss_type=loss_type)


def test_frozen_backbone_trains_the_head_alone(tmp_path: Path, sd3_pipeline: Any) -> None:
    reward = tiny_reward(pipeline=sd3_pipeline)
    before = {name: p.detach().clone() for name, p in reward.model.trainable_state().items()}
    trainer = trainer_of(
        reward, tmp_path, freeze_backbone=True, ema_decay=0.9, save_strategy="steps", save_steps=10, learning_rate=3e-3
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * first
    after = reward.model.trainable_state()
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert any(name.startswith("head.") for name in moved)
    assert not any(".lora_" in name for name in moved)
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for name, p in after.items() if name.startswith("head.")}

    resumed = trainer_of(
        tiny_reward(pipeline=sd3_pipeline), tmp_path, freeze_backbone=True, ema_decay=0.9, learning_rate=3e-3
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert all(torch.equal(p, after[name]) for name, p in resumed.reward.model.trainable_state().items())
    loaded = LatentReward.from_pretrained(tmp_path / "checkpoint-30", pipeline=sd3_pipeline)
    assert loaded.merged
    latents = separable_pairs(3).chosen
    reward.model.set_trainable(False)
    torch.testing.assert_close(loaded(latents, "x", seed=0), reward(latents, "x", seed=0))


@pytest.fixture
def bitsandbytes() -> Any:
    module = pytest.importorskip("bitsandbytes")
    try:
        module.functional.quantize_4bit(torch.ones(64), quant_type="nf4")
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot quantise to 4 bits on this CPU: {error}")
    return module


@pytest.mark.parametrize("quantised", ["copy", "generator"])
def test_4bit_backbone_trains_and_loads_on_a_dense_one(tmp_path: Path, bitsandbytes: Any, quantised: str) -> None:
    from dina_reward.backbones.quantization import quantize_blocks

    pipeline = tiny_sd3_pipeline()
    if quantised == "generator":
        quantize_blocks(pipeline.transformer)
    reward = tiny_reward(pipeline=pipeline, load_in_4bit=True)
    assert reward.quantized
    layer = reward.model.backbone.get_base_model().transformer_blocks[0].attn.to_q.base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    dense = type(pipeline.transformer.transformer_blocks[0].attn.to_q) is torch.nn.Linear
    assert dense == (quantised == "copy")  # the generator is left as it is
    trainer = trainer_of(reward, tmp_path, learning_rate=3e-3, gradient_checkpointing=True, max_steps=20)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    trainer.save_model(str(tmp_path / "reward"))

    latents = torch.cat([separable_pairs(6).chosen, separable_pairs(6).rejected])
    scores = reward.eval()(latents, "a red circle", seed=0)
    assert not reward.merged
    with pytest.raises(ValueError, match="cannot be merged into 4-bit weights"):
        reward.merge_lora()
    plain = LatentReward.from_pretrained(tmp_path / "reward", pipeline=tiny_sd3_pipeline())
    assert plain.merged
    expected = plain(latents, "a red circle", seed=0)
    assert (scores - expected).norm() < 0.1 * (expected - expected.mean()).norm()
    again = LatentReward.from_pretrained(tmp_path / "reward", pipeline=tiny_sd3_pipeline(), load_in_4bit=True)
    torch.testing.assert_close(again(latents, "a red circle", seed=0), scores)


def test_a_shared_backbone_is_not_quantised(bitsandbytes: Any, sd3_pipeline: Any) -> None:
    with pytest.raises(ValueError, match="would alter the generator's weights"):
        tiny_reward(pipeline=sd3_pipeline, share_backbone=True, load_in_4bit=True)


def test_rows_with_embeddings_need_no_text_encoder(tmp_path: Path, sd3_pipeline: Any) -> None:
    plain = tiny_reward(pipeline=sd3_pipeline)
    rows = embedded_rows(sd3_pipeline, plain)
    bare = LatentReward.from_config(
        plain.config, transformer=sd3_pipeline.transformer, scheduler=sd3_pipeline.scheduler, lora_config=LORA
    )
    losses = []
    for reward, dataset in ((plain, [{**row, "prompt_embeds": None} for row in rows]), (bare, rows)):
        trainer = trainer_of(reward, tmp_path, dataset, max_steps=3)
        trainer.train()
        losses.append([trainer.evaluate()["eval_loss"], trainer.state.log_history[-3]["loss"]])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="no text encoders"):
        trainer_of(bare, tmp_path, [{**row, "prompt_embeds": None} for row in rows], max_steps=1).train()


def test_embeddings_of_another_model_are_refused(tmp_path: Path, sd3_pipeline: Any) -> None:
    reward = tiny_reward(pipeline=sd3_pipeline)
    rows = [{**row, "prompt_embeds": torch.zeros(4, 7)} for row in embedded_rows(sd3_pipeline, reward)]
    with pytest.raises(ValueError, match=r"sd3 takes \(batch, length, 64\)"):
        trainer_of(reward, tmp_path, rows, max_steps=1).train()


def test_best_checkpoint_by_the_real_accuracy(tmp_path: Path, sd3_pipeline: Any) -> None:
    """Scores change their sign at step 20, so an earlier checkpoint is the best one."""

    class Unlearns(LatentRewardTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 20:
                self.reward.model.head.head.weight.data.mul_(-1)
            return loss

    trainer = Unlearns(
        tiny_reward(pipeline=sd3_pipeline),
        training_config(
            tmp_path, max_steps=22, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="accuracy",
        ),
        train_dataset=separable_pairs(),
        eval_dataset=separable_pairs(24, seed=1),
    )  # fmt: skip
    trainer.train()
    history = {line["step"]: line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line}
    best = next(step for step, value in history.items() if value == max(history.values()))
    assert history[22] < 0.5 < history[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_accuracy"] == max(history.values())
