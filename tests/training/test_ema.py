from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dina_reward.training.ema import EMA_WEIGHTS_NAME, EMACallback
from tests.training.toy import ToyModel, toy_trainer


def drive(callback: EMACallback, model: ToyModel, values: list[float], start: int = 0) -> None:
    """Sets the weight to each value in turn, as if one optimizer step had done it."""
    state, control, args = TrainerState(), TrainerControl(), TrainingArguments(use_cpu=True, report_to="none")
    callback.on_train_begin(args, state, control)
    for step, value in enumerate(values, start=start + 1):
        with torch.no_grad():
            model.linear.weight.fill_(value)
        state.global_step = step
        callback.on_step_end(args, state, control)


def average(callback: EMACallback, model: ToyModel) -> float:
    with callback.average_parameters():
        return model.linear.weight.item()


def test_numbers_follow_the_warm_up_formula() -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.5)
    values = [1.0, 4.0, -2.0, 8.0] + [0.5] * 20
    drive(callback, model, values)
    expected = values[0]
    for update, value in enumerate(values[1:], start=2):
        decay = min(0.5, update / (9 + update))
        expected = decay * expected + (1 - decay) * value
    assert average(callback, model) == pytest.approx(expected, abs=1e-6)
    assert callback.num_updates == len(values)


def test_averages_of_a_compiled_model_have_the_names_of_the_model(tmp_path: Path) -> None:
    model = ToyModel()
    callback = EMACallback(torch.compile(model, backend="eager"), decay=0.5)  # type: ignore[arg-type]
    drive(callback, model, [1.0, 4.0])
    callback.save_state(str(tmp_path))
    plain = EMACallback(model, decay=0.5)
    plain.load_state(str(tmp_path))
    assert average(plain, model) == average(callback, model)


def test_updates_every_n_steps() -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.5, update_every=3)
    drive(callback, model, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert callback.num_updates == 2
    decay = 2 / 11
    assert average(callback, model) == pytest.approx(decay * 3 + (1 - decay) * 6, abs=1e-6)


def test_swap_restores_the_trained_parameters_even_after_an_error() -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.9)
    drive(callback, model, [1.0, 5.0])

    def fail_inside() -> None:
        with callback.average_parameters():
            with callback.average_parameters():
                assert model.linear.weight.item() != 5.0
            assert model.linear.weight.item() != 5.0
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.linear.weight.item() == 5.0


def test_frozen_parameters_are_left_alone(tmp_path: Path) -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.9)
    drive(callback, model, [1.0, 5.0])
    callback.save_state(str(tmp_path))
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / EMA_WEIGHTS_NAME)) == {"linear.weight", "linear.bias"}


def test_saved_averages_resume_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1, 0.7, -0.3, 1.9, 2.3, 0.2]
    model = ToyModel()
    whole = EMACallback(model, decay=0.9)
    drive(whole, model, values)

    first = EMACallback(model, decay=0.9)
    drive(first, model, values[:3])
    first.save_state(str(tmp_path))
    second = EMACallback(model, decay=0.9)
    second.load_state(str(tmp_path))
    drive(second, model, values[3:], start=3)
    assert average(second, model) == average(whole, model)
    assert second.num_updates == whole.num_updates == 6


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    whole_model, resumed_model = ToyModel(), ToyModel()
    whole = EMACallback(whole_model, decay=0.9, update_every=2)
    toy_trainer(tmp_path, model=whole_model, callbacks=[whole]).train()
    resumed = EMACallback(resumed_model, decay=0.9, update_every=2)
    toy_trainer(tmp_path, model=resumed_model, callbacks=[resumed]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert average(whole, whole_model) == average(resumed, resumed_model)


def test_second_training_starts_afresh() -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.9)
    drive(callback, model, [100.0] * 5)
    drive(callback, model, [1.0])
    assert average(callback, model) == 1.0


def test_checkpoint_without_averages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kept no moving average"):
        EMACallback(ToyModel()).load_state(str(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"linear.weight": torch.zeros(1, 1)}, "lacks 'linear.bias'"),
        ({"linear.weight": torch.zeros(1, 1), "linear.bias": torch.zeros(1), "x": torch.zeros(1)}, "unexpected 'x'"),
        ({"linear.weight": torch.zeros(2, 1), "linear.bias": torch.zeros(1)}, "other shapes for 'linear.weight'"),
    ],
)
def test_averages_of_another_model_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / EMA_WEIGHTS_NAME, metadata={"num_updates": "3"})
    with pytest.raises(ValueError, match=message):
        EMACallback(ToyModel()).load_state(str(tmp_path))


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": 0.0}, {"update_every": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="EMA"):
        EMACallback(ToyModel(), **arguments)  # type: ignore[arg-type]


def test_averages_of_bfloat16_parameters_are_float32() -> None:
    model = ToyModel().to(torch.bfloat16)
    callback = EMACallback(model, decay=0.999)
    drive(callback, model, [1.0, *[1.0078125] * 20])  # the next number above 1
    assert callback._ema is not None
    expected = 1.0
    for update in range(2, 22):
        decay = min(0.999, update / (9 + update))
        expected = decay * expected + (1 - decay) * 1.0078125
    averages = dict(zip(callback._parameters(), callback._ema.shadow_params, strict=True))
    assert averages["linear.weight"].dtype == torch.float32
    assert averages["linear.weight"].item() == pytest.approx(expected, abs=1e-6)
    before = model.linear.weight.clone()
    with callback.average_parameters():
        assert model.linear.weight.dtype == torch.bfloat16
    assert torch.equal(model.linear.weight, before)


def test_only_ranks_that_save_write(tmp_path: Path) -> None:
    model = ToyModel()
    callback = EMACallback(model, decay=0.9)
    drive(callback, model, [1.0])
    callback._saves = False
    callback.save_state(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_zero_3_is_refused() -> None:
    model = ToyModel()
    model.linear.weight.ds_id = 0  # what DeepSpeed marks partitioned parameters with
    callback = EMACallback(model, decay=0.9)
    with pytest.raises(ValueError, match="'linear.weight' is partitioned by DeepSpeed ZeRO-3"):
        drive(callback, model, [1.0])
