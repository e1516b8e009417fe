from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward, NonFiniteError
from dina_reward.training import LatentRewardTrainer
from tests.training.tiny_reward import separable_pairs, tiny_reward, tiny_trainer, trained_parameters, training_config


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def losses(trainer: LatentRewardTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_learns_a_separable_preference(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, max_steps=40, eval_ensemble_levels=[0.1, 0.5])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert sum(losses(trainer)[-10:]) < 0.3 * sum(losses(trainer)[:10])
    assert after["eval_loss"] < before["eval_loss"]
    for setting in ("0.1", "0.5", "ensemble"):
        assert after[f"eval_accuracy_{setting}"] > 0.9
    assert {"accuracy", "margin", "loss/low_noise", "loss/high_noise"} <= {
        key for line in trainer.state.log_history for key in line
    }


def test_one_forward_for_both_sides_under_the_same_noise(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline)
    calls: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def record(module: Any, args: tuple[Any, ...]) -> None:
        calls.append((args[0], args[1], len(args[2]), args[3]))

    trainer.reward.model.register_forward_pre_hook(record)
    batch = trainer.data_collator([separable_pairs()[index] for index in range(5)])
    trainer.compute_loss(trainer.model, batch)
    ((noisy, timestep, num_prompts, prompt_index),) = calls
    assert noisy.shape == (10, 16, 8, 8)
    assert num_prompts == 2
    assert prompt_index.tolist() == [0, 1, 0, 1, 0] * 2
    assert torch.equal(timestep[:5], timestep[5:])
    assert len(timestep[:5].unique()) == 5
    signal = (1 - timestep[:5] / 1000)[:, None, None, None]
    torch.testing.assert_close(
        noisy[:5] - noisy[5:], signal * (batch["chosen"] - batch["rejected"]), atol=1e-4, rtol=0
    )


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, sd3_pipeline: Any) -> None:
    arguments: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    whole = tiny_trainer(tmp_path, sd3_pipeline, per_device_train_batch_size=8, **arguments)
    parts = tiny_trainer(
        tmp_path, sd3_pipeline, per_device_train_batch_size=2, gradient_accumulation_steps=4, **arguments
    )
    whole.train()
    parts.train()
    for name, parameter in trained_parameters(whole).items():
        torch.testing.assert_close(trained_parameters(parts)[name], parameter, rtol=1e-4, atol=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path, sd3_pipeline: Any) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "ema_decay": 0.9,
        "ema_update_every": 2,
        "level_distribution": "logit_normal",
    }
    whole = tiny_trainer(tmp_path, sd3_pipeline, **arguments)
    whole.train()
    torch.manual_seed(1234)
    resumed = tiny_trainer(tmp_path, sd3_pipeline, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trained_parameters(whole), trained_parameters(resumed))
    assert whole.ema is not None
    assert resumed.ema is not None
    with whole.ema.average_parameters(), resumed.ema.average_parameters():
        assert_same(trained_parameters(whole), trained_parameters(resumed))
    assert losses(resumed) == losses(whole)


def test_resume_does_not_depend_on_which_prompts_were_met(tmp_path: Path, sd3_pipeline: Any) -> None:
    """Every row has a prompt of its own, so that a resumed process meets others together than the first one did."""
    arguments: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    pairs = separable_pairs(count=32)
    pairs.prompts = [f"{row % 24} red circles" for row in range(32)]

    def trainer() -> LatentRewardTrainer:
        return LatentRewardTrainer(
            tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path, **arguments), train_dataset=pairs
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(trained_parameters(whole), trained_parameters(resumed))


def test_run_killed_while_saving_resumes_from_a_whole_checkpoint(
    tmp_path: Path, sd3_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", sd3_pipeline, **arguments)
    whole.train()
    killed = tiny_trainer(tmp_path / "killed", sd3_pipeline, **arguments)
    save = killed.reward.save_pretrained

    def dies_in_third_checkpoint(directory: Path) -> None:
        save(directory)
        if killed.state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(killed.reward, "save_pretrained", dies_in_third_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    names = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2"]
    resumed = tiny_trainer(tmp_path / "killed", sd3_pipeline, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained_parameters(whole), trained_parameters(resumed))


def test_checkpoint_is_a_reward_checkpoint(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, save_strategy="steps", save_steps=4)
    trainer.train()
    loaded = LatentReward.from_pretrained(tmp_path / "checkpoint-4", pipeline=sd3_pipeline)
    latents = separable_pairs().chosen[:3]
    expected = trainer.reward.eval()(latents, "a red circle", seed=0)
    torch.testing.assert_close(loaded(latents, "a red circle", seed=0), expected)
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "training_args.bin" not in files
    assert (
        json.loads((tmp_path / "checkpoint-4" / "training_args.json").read_text())["loss_type"] == "thurstone_fidelity"
    )


def test_average_serves_evaluation_and_the_final_save(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, ema_decay=0.9, max_steps=6, eval_noise_levels=[0.5])
    trainer.train()
    trained = trained_parameters(trainer)
    margin = trainer.evaluate()["eval_margin"]
    assert_same(trained_parameters(trainer), trained)
    trainer.save_model(str(tmp_path / "final"))
    assert_same(trained_parameters(trainer), trained)

    averaged = tiny_trainer(tmp_path, sd3_pipeline, eval_noise_levels=[0.5])
    averaged.reward.load_weights(tmp_path / "final")
    assert averaged.evaluate()["eval_margin"] == pytest.approx(margin, abs=1e-6)
    assert any(not torch.equal(trained_parameters(averaged)[name], trained[name]) for name in trained)


def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, sd3_pipeline: Any) -> None:
    class GetsWorse(LatentRewardTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_accuracy": 1 / self.state.global_step}

    trainer = tiny_trainer(
        tmp_path,
        sd3_pipeline,
        GetsWorse,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        ema_decay=0.9,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
    )
    trainer.train()
    best = tiny_reward(pipeline=sd3_pipeline)
    best.load_weights(tmp_path / "checkpoint-1")
    for name, parameter in trained_parameters(trainer).items():
        assert torch.equal(parameter, best.model.trainable_state()[name])
    assert trainer.ema is not None
    assert trainer.ema.num_updates == 1


def test_evaluation_is_deterministic_and_independent_of_the_batch_size(tmp_path: Path, sd3_pipeline: Any) -> None:
    small = tiny_trainer(tmp_path, sd3_pipeline, per_device_eval_batch_size=5)
    large = tiny_trainer(tmp_path, sd3_pipeline, per_device_eval_batch_size=24)
    first, second, third = small.evaluate(), small.evaluate(), large.evaluate()
    for name in ("eval_loss", "eval_margin", "eval_accuracy"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(third[name], abs=1e-5)


def test_several_evaluation_datasets(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline)
    metrics = trainer.evaluate({"easy": separable_pairs(4), "other": separable_pairs(6, seed=5)})
    assert {"eval_easy_accuracy_0.1", "eval_other_accuracy_0.5"} <= set(metrics)


@pytest.mark.filterwarnings("ignore")
def test_eight_bit_optimizer(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, optim="adamw_bnb_8bit", max_steps=12)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ in ("AdamW", "AdamW8bit")
    states = trainer.optimizer.optimizer.state.values()
    assert any(
        tensor.dtype == torch.uint8 for state in states for tensor in state.values() if isinstance(tensor, Tensor)
    )
    assert sum(losses(trainer)[-4:]) < sum(losses(trainer)[:4])


def test_bf16_computes_by_autocast_over_float32_weights(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, bf16=True, max_steps=2)
    dtypes = set()
    block = trainer.reward.model.backbone.get_base_model().transformer_blocks[0]
    block.attn.to_q.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained_parameters(trainer).values()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    dtypes.clear()
    trainer.reward.eval()(separable_pairs().chosen[:2], "a red circle", seed=0)
    assert dtypes == {torch.float32}


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, sd3_pipeline: Any) -> None:
    plain = tiny_trainer(tmp_path, sd3_pipeline, max_steps=2)
    recomputing = tiny_trainer(tmp_path, sd3_pipeline, max_steps=2, gradient_checkpointing=True)
    plain.train()
    recomputing.train()
    assert recomputing.reward.model.backbone.get_base_model().gradient_checkpointing
    for name, parameter in trained_parameters(plain).items():
        torch.testing.assert_close(trained_parameters(recomputing)[name], parameter, rtol=1e-5, atol=1e-7)


def test_labels_and_weights_reach_the_loss(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline)
    rows = [separable_pairs()[index] for index in range(4)]
    batch = trainer.data_collator(rows)
    plain = trainer.compute_loss(trainer.model, batch)
    swapped = trainer.data_collator(
        [{**row, "chosen": row["rejected"], "rejected": row["chosen"], "p_chosen": 0.0} for row in rows]
    )
    trainer._micro_step = (-1, 0)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, swapped), plain)
    trainer._micro_step = (-1, 0)
    weighted = trainer.data_collator([{**row, "weight": 2.0} for row in rows])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, weighted), 2 * plain)


def test_pairs_beyond_doubt_send_no_traces_of_gradients_back(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline, level_distribution="constant", level_value=0.4)
    batch = trainer.data_collator([separable_pairs()[index] for index in range(3)])
    scores = torch.tensor([0.5, 10.0, 12.0, 0.0, 0.0, 0.0], requires_grad=True)  # three chosen, three rejected
    trainer.compute_loss(lambda *inputs: scores, batch).backward()
    assert scores.grad is not None
    z, normal = torch.tensor(0.5 / 0.86), torch.distributions.Normal(0, 1)
    slope = float(normal.log_prob(z).exp() / (2 * 0.86 * normal.cdf(z).sqrt()))
    assert scores.grad.tolist() == pytest.approx([-slope / 3, 0, 0, slope / 3, 0, 0], rel=1e-3, abs=0)


def test_trains_from_a_huggingface_dataset(tmp_path: Path, sd3_pipeline: Any) -> None:
    import datasets

    pairs = separable_pairs(8)
    rows = datasets.Dataset.from_list(
        [
            {**row, "chosen": row["chosen"].tolist(), "rejected": row["rejected"].tolist()}
            for row in map(pairs.__getitem__, range(8))
        ]
    )
    from_rows = LatentRewardTrainer(
        tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path, max_steps=2), train_dataset=rows
    )
    from_tensors = LatentRewardTrainer(
        tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path, max_steps=2), train_dataset=pairs
    )
    from_rows.train()
    from_tensors.train()
    assert_same(trained_parameters(from_rows), trained_parameters(from_tensors))


def test_wrong_latents_are_refused(tmp_path: Path, sd3_pipeline: Any) -> None:
    rows = [{"prompt": "x", "chosen": torch.zeros(4, 8, 8), "rejected": torch.zeros(4, 8, 8)}]
    trainer = LatentRewardTrainer(tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="4 channels"):
        trainer.train()


def test_missing_columns_are_refused_before_training(tmp_path: Path, sd3_pipeline: Any) -> None:
    with pytest.raises(ValueError, match="lack the columns"):
        LatentRewardTrainer(
            tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path), train_dataset=[{"prompt": "x", "image": 1}]
        )


def test_training_without_a_dataset_is_refused(tmp_path: Path, sd3_pipeline: Any) -> None:
    with pytest.raises(ValueError, match="needs a train_dataset"):
        LatentRewardTrainer(tiny_reward(pipeline=sd3_pipeline), training_config(tmp_path)).train()


def test_scores_that_are_not_finite_stop_training(tmp_path: Path, sd3_pipeline: Any) -> None:
    trainer = tiny_trainer(tmp_path, sd3_pipeline)
    with torch.no_grad():
        trainer.reward.model.head.query_tokens.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite at step 0"):
        trainer.train()


def test_checkpoint_without_average_cannot_resume_a_run_with_one(tmp_path: Path, sd3_pipeline: Any) -> None:
    tiny_trainer(tmp_path, sd3_pipeline, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="ema_decay: null there, 0.9 here"):
        tiny_trainer(tmp_path, sd3_pipeline, ema_decay=0.9).train(resume_from_checkpoint=True)
