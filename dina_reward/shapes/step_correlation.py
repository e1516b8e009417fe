"""How well scores inside a sampler predict how a sample ends, and how well credits of its steps match what the steps do.

`python -m dina_reward.shapes.step_correlation` samples groups as the trainer does and writes a table, JSON and a figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.objectives.credit import gains_to_go
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import PredictFunction, sample
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import generator_from
from dina_reward.alignment.trainers.grpo_config import DiffusionGRPOConfig
from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.reward import LatentReward
from dina_reward.shapes.alignment import alignment_config, held_out_prompts
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.shipped import load_pipeline, load_reward
from dina_reward.shapes.worlds import WORLDS


SCORERS = {"state": "noisy state", "clean": "predicted clean latent"}
TARGETS = {"reward": "final latent reward", "quality": "final oracle quality", "fit": "final oracle fit"}
# The last two are `credit: gain` with `credit_discount` 0 and 1.
CREDITS = {
    "terminal": "terminal reward",
    "state_gain": "gain of noisy-state scores",
    "clean_gain": "gain of predicted rewards",
    "clean_baseline": "gain up to the end",
}


@dataclass(frozen=True)
class Groups:
    """Groups of samples that share a prompt and a window of stochastic steps; rows of a group are neighbours.

    Args:
        window (`range`): the stochastic steps.
        state_scores (`Tensor`): score of the state before each step, and of the end, at its own noise level, shape
            ``(rows, steps + 1)``.
        clean_scores (`Tensor`): reward of the clean latent that is predicted at each step, shape ``(rows, steps)``.
        final (`dict[str, Tensor]`): how the samples end, by the names of `TARGETS`, shape ``(rows,)``.
        ends (`dict[int, Tensor]`): final rewards of fresh continuations from the states before the steps of the window and
            after the last, shape ``(rows, continuations)``; one is enough after the last.
    """

    window: range
    state_scores: Tensor
    clean_scores: Tensor
    final: dict[str, Tensor]
    ends: dict[int, Tensor]

    def effects(self, step: int) -> tuple[Tensor, Tensor]:
        """Two estimates of ``E[r | x_{k+1}] - E[r | x_k]`` from separate continuations, shape ``(rows,)`` each."""
        halves = [[half.mean(dim=1) for half in _halves(self.ends[index])] for index in (step, step + 1)]
        return halves[1][0] - halves[0][0], halves[1][1] - halves[0][1]

    def credits(self, step: int) -> dict[str, Tensor]:
        """What each kind of credit in `CREDITS` gives a step, shape ``(rows,)``."""
        known, reward, position = list(self.window), self.final["reward"], self.window.index(step)
        values = self.clean_scores[:, known]
        return {
            "terminal": reward,
            "state_gain": self.state_scores[:, step + 1] - self.state_scores[:, step],
            "clean_gain": gains_to_go(values, reward, 0.0)[:, position],
            "clean_baseline": gains_to_go(values, reward, 1.0)[:, position],
        }


class StepStudy:
    """A shipped generator, its reward and the sampler with which alignment samples.

    Args:
        world (`str`): "flow" or "ddpm".
        config (`DiffusionGRPOConfig`): whose sampler, windows and noise level of the reward are used.
        members (`int`): samples per group.
        seed (`int`): of all noise.
    """

    def __init__(self, world: str, config: DiffusionGRPOConfig, members: int, seed: int) -> None:
        self.config, self.members, self.seed = config, members, seed
        self.pipeline = load_pipeline(world)
        self.reward: LatentReward = load_reward(world, pipeline=self.pipeline, share_backbone=True)
        # A new LoRA changes nothing.
        self.policy = Policy(
            self.pipeline,
            rank=1,
            alpha=1,
            guidance_scale=config.guidance_scale,
            max_sequence_length=config.max_sequence_length,
        )
        self.latent_shape = self.policy.latent_shape(config.height, config.width)
        self.sampler: Sampler = self.policy.sampler(
            config.num_inference_steps, self.latent_shape, sde_type=config.sde_type, eta=config.eta
        )

    @property
    def windows(self) -> list[range]:
        """Every place of the window of stochastic steps."""
        assert self.config.sde_window_range is not None
        assert self.config.sde_window_size is not None
        (low, high), size = self.config.sde_window_range, self.config.sde_window_size
        return [range(start, start + size) for start in range(low, high - size + 1)]

    @torch.no_grad()
    def sample_groups(self, prompts: Sequence[str], window: range, continuations: int) -> Groups:
        """One group per prompt.

        Args:
            prompts: the prompts.
            window: the stochastic steps.
            continuations: fresh ends from every state of the window; even.
        """
        rows = [prompt for prompt in prompts for _ in range(self.members)]
        device = torch.device("cpu")
        predict = self.policy.bind(self.policy.encode(rows, device), self.policy.encode_negative(device))
        states: list[Tensor] = []
        clean: list[Tensor] = []

        def recording(latents: Tensor, timestep: Tensor) -> Tensor:
            prediction = predict(latents, timestep)
            clean.append(self.sampler.predict_clean(len(states), latents, prediction))
            states.append(latents)
            return prediction

        end = self._end(recording, self._noise((len(rows), *self.latent_shape), window, 0), 0, window, 1)
        states.append(end)
        levels = self.sampler.levels.tolist()
        noisy = [self.reward.score_noisy(x, rows, noise_level=level) for x, level in zip(states, levels, strict=True)]
        return Groups(
            window=window,
            state_scores=torch.stack(noisy, dim=1),
            clean_scores=torch.stack([self._score(latents, rows) for latents in clean], dim=1),
            final={"reward": self._score(end, rows), **self._judged(end, rows)},
            ends={
                index: torch.stack(
                    [
                        self._score(self._end(predict, states[index], index, window, 2 + draw), rows)
                        for draw in range(continuations if index < window.stop else 1)
                    ],
                    dim=1,
                )
                for index in range(window.start, window.stop + 1)
            },
        )

    def _end(self, predict: PredictFunction, latents: Tensor, start: int, window: range, draw: int) -> Tensor:
        stochastic = [step for step in window if step >= start]
        noise = self._noise((len(latents), len(stochastic), *self.latent_shape), window, start, draw)
        return sample(
            predict,
            latents,
            self.sampler,
            start=start,
            stochastic=stochastic,
            step_noise=noise if stochastic else None,
        ).latents

    def _noise(self, shape: Sequence[int], window: range, *parts: int) -> Tensor:
        return torch.randn(tuple(shape), generator=generator_from(self.seed, window.start, *parts))

    def _score(self, latents: Tensor, rows: Sequence[str]) -> Tensor:
        """The reward as training takes it: a group shares its noise."""
        seeds = [row // self.members for row in range(len(rows))]
        return self.reward(latents, list(rows), noise_level=self.config.reward_noise_level, seed=seeds)

    def _judged(self, latents: Tensor, rows: Sequence[str]) -> dict[str, Tensor]:
        scores = Oracle()(decode_latents(self.pipeline.vae, latents), list(rows))
        return {"quality": scores.quality, "fit": scores.fit}


def pearson(first: Tensor, second: Tensor, members: int) -> Tensor:
    """Correlation inside each group of neighbouring rows, shape ``(groups,)``; NaN where one of the two does not vary."""
    first, second = (values.double().reshape(-1, members) for values in (first, second))
    first, second = first - first.mean(dim=1, keepdim=True), second - second.mean(dim=1, keepdim=True)
    return (first * second).sum(dim=1) / (first.square().sum(dim=1) * second.square().sum(dim=1)).sqrt()


def spearman(first: Tensor, second: Tensor, members: int) -> Tensor:
    """Rank correlation inside each group, shape ``(groups,)``; equal values share their mean rank."""
    return pearson(_ranks(first, members), _ranks(second, members), members)


def _ranks(values: Tensor, members: int) -> Tensor:
    groups = values.reshape(-1, members)
    differences = groups[:, :, None] - groups[:, None, :]
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).sum(dim=2).flatten()


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    half = max(1, values.shape[1] // 2)
    return values[:, :half], values[:, -half:]


def _mean(values: Tensor) -> list[float]:
    """Mean over groups and its standard error; groups without a value are left out."""
    values = values[~values.isnan()]
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return [float(values.mean()), error]


def predictiveness(groups: Sequence[Groups], levels: Sequence[float], members: int) -> list[dict[str, Any]]:
    """Per step and scorer: correlation inside a group of the score with each target, ``[mean, standard error]``."""
    rows = []
    for scorer in SCORERS:
        for step in range(getattr(groups[0], f"{scorer}_scores").shape[1]):
            row: dict[str, Any] = {"scorer": scorer, "step": step, "level": levels[step]}
            parts = [(getattr(part, f"{scorer}_scores")[:, step], part.final) for part in groups]
            deviations = torch.cat([score.reshape(-1, members).std(dim=1) for score, _ in parts])
            row["deviation"] = float(deviations.mean())
            for target in TARGETS:
                for name, measure in (("pearson", pearson), ("spearman", spearman)):
                    values = torch.cat([measure(score, final[target], members) for score, final in parts])
                    row[f"{target}_{name}"] = _mean(values)
            rows.append(row)
    return rows


def credit_signal(groups: Sequence[Groups], members: int) -> list[dict[str, Any]]:
    """Per stochastic step: correlation inside a group of each credit with the step's effect, ``[mean, standard error]``.

    Effects are estimates. The ``ceiling`` is what the true effect would reach: ``sqrt(2 r / (1 + r))``, where ``r`` is the
    correlation of the two halves of the estimate.
    """
    rows = []
    for step in sorted({step for part in groups for step in part.window}):
        parts = [part for part in groups if step in part.window]
        effects = [part.effects(step) for part in parts]
        mean = [(first + second) / 2 for first, second in effects]
        reliability = float(torch.cat([pearson(*halves, members) for halves in effects]).nanmean())
        row: dict[str, Any] = {
            "step": step,
            "ceiling": (2 * max(reliability, 0.0) / (1 + max(reliability, 0.0))) ** 0.5,
        }
        row["deviation"] = float(torch.cat([effect.reshape(-1, members).std(dim=1) for effect in mean]).mean())
        for credit in CREDITS:
            pairs = [(part.credits(step)[credit], effect) for part, effect in zip(parts, mean, strict=True)]
            row[credit] = _mean(torch.cat([pearson(given, effect, members) for given, effect in pairs]))
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Both tables: of scores (Pearson / Spearman), and of credits."""
    columns = [(target, scorer) for target in ("reward", "quality", "fit") for scorer in SCORERS]
    lines = [
        f"| step | level | {' | '.join(f'{scorer}, {target}' for target, scorer in columns)} | spread of state scores |"
    ]
    lines.append("|---" * (len(columns) + 3) + "|")
    found = {(row["scorer"], row["step"]): row for row in report["predictiveness"]}
    for step in sorted({step for _, step in found}):
        cells = [_pair(found.get((scorer, step)), target) for target, scorer in columns]
        state = found["state", step]
        lines.append(f"| {step} | {state['level']:.2f} | {' | '.join(cells)} | {state['deviation']:.2f} |")
    lines += ["", f"| step | {' | '.join(CREDITS.values())} | true effect |", "|---" * (len(CREDITS) + 2) + "|"]
    for row in report["credit"]:
        cells = [f"{row[credit][0]:.2f} ± {row[credit][1]:.2f}" for credit in CREDITS]
        lines.append(f"| {row['step']} | {' | '.join(cells)} | {row['ceiling']:.2f} |")
    return "\n".join(lines) + "\n"


def _pair(row: dict[str, Any] | None, target: str) -> str:
    return "" if row is None else f"{row[f'{target}_pearson'][0]:.2f} / {row[f'{target}_spearman'][0]:.2f}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Left and middle: scores against the end, by step; right: credits against effects."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, target in zip(panels, ("reward", "quality"), strict=False):
        _draw_scores(panel, report["predictiveness"], target)
    rows = report["credit"]
    steps = [row["step"] for row in rows]
    for (credit, label), colour in zip(CREDITS.items(), ("0.4", "tab:red", "tab:blue", "tab:cyan"), strict=True):
        values, errors = zip(*(row[credit] for row in rows), strict=True)
        panels[2].errorbar(steps, values, errors, fmt="o-", color=colour, markersize=4, label=label)
    panels[2].plot(steps, [row["ceiling"] for row in rows], "k:", label="the true effect (its estimate is noisy)")
    panels[2].set(title="Credit of a step and its effect on the reward", xlabel="stochastic step", xticks=steps)
    panels[0].set(ylabel="correlation inside a group of one prompt", ylim=(-0.3, 1.05))
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.savefig(path, dpi=110)


def _draw_scores(panel: Any, found: Sequence[dict[str, Any]], target: str) -> None:
    for scorer, colour in zip(SCORERS, ("tab:red", "tab:blue"), strict=True):
        rows = [row for row in found if row["scorer"] == scorer]
        for name, style in (("pearson", "o-"), ("spearman", "x--")):
            values, errors = zip(*(row[f"{target}_{name}"] for row in rows), strict=True)
            label = f"{SCORERS[scorer]}, {name.title()}"
            steps = [row["step"] for row in rows]
            panel.errorbar(steps, values, errors, fmt=style, color=colour, markersize=4, label=label)
    states = [row for row in found if row["scorer"] == "state"]
    panel.set_xticks([row["step"] for row in states], [f"{row['step']}\n{row['level']:.2f}" for row in states])
    panel.set(title=f"Score of a state and {TARGETS[target]}", xlabel="state before step, and its noise level")


def study(
    output: Path, *, world: str = "flow", prompts: int, members: int, continuations: int, seed: int
) -> dict[str, Any]:
    """Samples, correlates, and writes ``step_correlation.json``, ``.md`` and ``.png`` to a directory.

    Args:
        output: the directory.
        world: "flow" or "ddpm".
        prompts: held-out prompts, each with one group per place of the window.
        members: samples per group.
        continuations: fresh ends from every state of a window; even.
        seed: of all noise.
    """
    if members < 3 or continuations < 2 or continuations % 2:
        raise ValueError(
            f"need at least 3 members and an even number of continuations, got {members}, {continuations}"
        )
    work = StepStudy(world, alignment_config(output, world=world), members, seed)
    groups = [work.sample_groups(held_out_prompts()[:prompts], window, continuations) for window in work.windows]
    levels = work.sampler.levels.tolist()
    report = {
        "settings": {
            "world": world,
            "prompts": prompts,
            "members": members,
            "continuations": continuations,
            "seed": seed,
        },
        "predictiveness": predictiveness(groups, levels, members),
        "credit": credit_signal(groups, members),
    }
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / "step_correlation.json") as staging:
        staging.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "step_correlation.md").write_text(markdown(report), encoding="utf-8")
    draw(report, output / "step_correlation.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Correlate scores inside the sampler with how samples end.")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/step-correlation"), help="directory of the results"
    )
    parser.add_argument("--world", choices=[world.name for world in WORLDS], default="flow", help="which generator")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument("--members", type=int, default=12, help="samples per prompt and place of the window")
    parser.add_argument("--continuations", type=int, default=4, help="fresh ends from every state of the window")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    arguments = parser.parse_args()
    report = study(
        arguments.output,
        world=arguments.world,
        prompts=arguments.prompts,
        members=arguments.members,
        continuations=arguments.continuations,
        seed=arguments.seed,
    )
    print(markdown(report))
    print(f"results and figure: {arguments.output}")


if __name__ == "__main__":
    main()
