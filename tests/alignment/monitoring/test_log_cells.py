from __future__ import annotations

from dina_reward.alignment.monitoring.log_cells import alignment_cells
from dina_reward.training.log_table import ALARM
from tests.alignment.helpers import PROMPTS, logged, tiny_trainer


def test_training_lines_show_the_reward():
    assert alignment_cells({"loss": 0.1, "reward": 2.0, "reward_std": 1.0, "train_seconds": 3.0}) == {"reward": 2.0}
    assert alignment_cells({"train_seconds": 3.0}) == {"reward": ""}


def test_evaluations_show_reward_judges_and_alarm():
    logs = {"eval_reward": 1.0, "eval_rewards/a": 2.0, "eval_rewards/b": 0.0, "eval_fit": 0.5, "eval_runtime": 9.0}
    expected = {"reward": "", "held-out reward": 1.0, "fit": 0.5}
    assert alignment_cells({**logs, "decoder_calls": 4}) == expected
    assert alignment_cells({**logs, "eval_hacking_alarm": 0.0}) == {**expected, "alarm": "no"}
    assert alignment_cells({**logs, "eval_hacking_alarm": 1.0}) == {**expected, "alarm": ALARM}


def test_a_run_prints_steps_rewards_judges_and_alarms(tmp_path, capsys):
    def redness(images, **kwargs):
        return images[:, 0].mean(dim=(1, 2))

    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        logging_steps=1,
        eval_dataset=PROMPTS,
        eval_reward_funcs=redness,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    trainer.train()
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["step", "reward", "held-out", "reward", "redness", "alarm", "s/step"]
    # Every second step samples nothing, so that there is no reward to show.
    assert [line[0] for line in lines[1:]] == ["0", "1", "1", "2", "3", "3", "4", "step"]
    held_out = [logged(trainer, f"eval_{name}")[1] for name in ("reward", "redness")]
    assert lines[3] == ["1", *(f"{value:.4g}" for value in held_out), "no"]
    assert lines[2][:2] == ["1", f"{logged(trainer, 'reward')[0]:.4g}"]
    assert len(lines[2]) == 3
    assert "{" not in output
