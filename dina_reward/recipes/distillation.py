"""A reward from a judge: what `recipes/distill_reward.py` and ``dina-reward distill`` run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dina_reward import LatentReward
from dina_reward.checkpoints.kept_results import write_whole
from dina_reward.checkpoints.model_card import model_card
from dina_reward.checks.stored import read_json
from dina_reward.checks.values import check_fields
from dina_reward.data import CachedPreferences
from dina_reward.distill import JudgeLabeller, JudgeLimits, LabelReport, LabelSettings, PipelineSource
from dina_reward.distill.naming import open_judges
from dina_reward.evaluation import EvaluationReport, PairProtocol, evaluate_preferences
from dina_reward.evaluation.cost import timed
from dina_reward.noise.draws import fold_seed
from dina_reward.recipes.alignment import load_generator, prompts_of, resume_point
from dina_reward.recipes.arguments import ConfigParser
from dina_reward.recipes.reward_training import RewardArguments, new_reward
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


EVALUATION_NAME = "distillation.json"
_SPLIT, _HELD_OUT = 0x73706C, 1
_TIMED_LATENTS = 32


@dataclass
class DistillArguments(RewardArguments):
    """Which judge to distil into a reward on which generator, with how many judgements."""

    _: KW_ONLY
    judge: list[str] = field(
        metadata={
            "help": "Judges by name: 'module:function', 'clip:MODEL', 'openai:MODEL', 'command:...' or a URL; see "
            "dina_reward.distill.naming."
        }
    )
    prompts: str = field(
        metadata={
            "help": "A text file with one per line, a folder of SPLIT.txt, a dataset with a prompt column, 'shapes'."
        }
    )
    budget: int = field(metadata={"help": "Judgements in all: a judged sample or a judged pair counts one."})
    judge_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per judge; null: all the same."}
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts; null: a share of the prompts is kept apart."}
    )
    eval_share: float = field(
        default=0.15, metadata={"help": "Share of the budget, and of the prompts unless there are others, held out."}
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward to go on from: its LoRA and head are trained further. null: from zero."},
    )
    height: int = field(default=1024, metadata={"help": "Image height in pixels."})
    width: int = field(default=1024, metadata={"help": "Image width in pixels."})
    num_inference_steps: int = field(default=28, metadata={"help": "Steps of the samples that are judged."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the samples that are judged."})
    sample_batch_size: int = field(default=8, metadata={"help": "Samples made at once."})
    group_size: int = field(default=4, metadata={"help": "Samples of a prompt that are judged and compared."})
    candidates: int = field(
        default=8,
        metadata={"help": "With reward_model_path: samples of a prompt, of which the informative are judged."},
    )
    exploration: float = field(
        default=0.25, metadata={"help": "Share of prompts whose judged samples are drawn at random."}
    )
    repeat_share: float = field(
        default=0.1, metadata={"help": "Judgements that are asked for twice, by which labels are softened."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Of soft labels, in the judge's units; null: fitted to its repetitions."}
    )
    tie_margin: float = field(default=0.0, metadata={"help": "Score gaps up to this are ties."})
    judge_batch_size: int = field(default=16, metadata={"help": "Samples or pairs that a judge gets at once."})
    judge_timeout: float | None = field(default=None, metadata={"help": "Seconds after which a call has failed."})
    judge_retries: int = field(default=2, metadata={"help": "Further tries of a call that failed."})
    cost_per_call: float = field(default=0.0, metadata={"help": "Price of a judgement, if the judge knows none."})
    max_cost: float | None = field(
        default=None, metadata={"help": "Stop before the judgements cost more; null: never."}
    )

    def __post_init__(self) -> None:
        check_fields(
            self,
            budget=(1, math.inf),
            eval_share=(0.01, 0.9),
            height=(1, 16_384),
            width=(1, 16_384),
            num_inference_steps=(1, 10_000),
            guidance_scale=(0, math.inf),
            sample_batch_size=(1, 100_000),
            judge_timeout=(1e-3, math.inf),
        )
        super().__post_init__()
        self.labels()
        self.limits()

    def labels(self) -> LabelSettings:
        """What is judged."""
        names = ("group_size", "exploration", "repeat_share", "temperature", "tie_margin")
        settings = {name: getattr(self, name) for name in names}
        return LabelSettings(candidates=max(self.candidates, self.group_size), **settings)

    def limits(self) -> JudgeLimits:
        """How judges are asked."""
        return JudgeLimits(
            self.judge_batch_size, self.judge_retries, cost_per_call=self.cost_per_call, max_cost=self.max_cost
        )


@dataclass
class DistillTrainingConfig(LatentRewardTrainingConfig):
    """`LatentRewardTrainingConfig` with defaults for a few thousand pairs."""

    output_dir: str | None = field(
        default="distilled_reward", metadata={"help": "Directory of the reward, its labels and its evaluation."}
    )
    num_train_epochs: float = field(default=8.0, metadata={"help": "Passes over the labelled pairs."})
    loss_type: str = field(
        default="thurstone_nll",
        metadata={"help": LatentRewardTrainingConfig.__dataclass_fields__["loss_type"].metadata["help"]},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})


@dataclass(frozen=True)
class Distillation:
    """What a distillation came to.

    Args:
        labels, eval_labels: of the pairs trained on, and of those on held-out prompts.
        evaluation: of the reward against the judge on the latter.
        judge_seconds: of a judgement, of a sample or of a pair, decoding included.
        reward_seconds: of the reward per latent.
    """

    labels: LabelReport
    eval_labels: LabelReport
    evaluation: EvaluationReport
    judge_seconds: float
    reward_seconds: float

    @property
    def cost_ratio(self) -> float:
        """Time of a judgement over that of a score."""
        return self.judge_seconds / self.reward_seconds

    def text(self) -> str:
        """What a command prints and a model card says."""
        table = "\n".join(f"    {line}" for line in self.evaluation.table().splitlines())
        return (
            f"Trained on: {self.labels}\n\nHeld out: {self.eval_labels}\n\n"
            f"Agreement with the judge on held-out prompts:\n\n{table}\n\n"
            f"A judgement takes {1000 * self.judge_seconds:.3g} ms, decoding included, a score "
            f"{1000 * self.reward_seconds:.3g} ms: {self.cost_ratio:.3g} to 1."
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "labels": self.labels.to_json(),
            "eval_labels": self.eval_labels.to_json(),
            "evaluation": self.evaluation.to_dict(),
            "judge_seconds": self.judge_seconds,
            "reward_seconds": self.reward_seconds,
            "cost_ratio": self.cost_ratio,
        }


def distill(arguments: DistillArguments, training_args: DistillTrainingConfig) -> Distillation:
    """Samples, labels, trains and evaluates; writes the reward to ``output_dir``. Started again, it goes on.

    Args:
        arguments: judge, prompts and reward.
        training_args: of `LatentRewardTrainer`.

    Raises:
        JudgeError: (a `ValueError`) a judge failed or would cost too much; what it has said is kept.
        ValueError: settings do not fit.
    """
    output = Path(str(training_args.output_dir))
    judges = open_judges(arguments.judge, arguments.judge_timeout)
    labeller = JudgeLabeller(judges, arguments.judge_weights, arguments.limits(), arguments.labels())
    train, held_out = split_prompts(arguments, training_args.seed)
    pipeline = load_generator(arguments.model_name_or_path, arguments.torch_dtype, training_args.device)
    reward = _reward(arguments, pipeline, training_args)
    start = reward if arguments.reward_model_path else None
    reports = _label(labeller, arguments, pipeline, (train, held_out), start, training_args, output)

    trainer = LatentRewardTrainer(reward, training_args, CachedPreferences(output / "labels" / "train"))
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model(str(output))
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    reward.load_weights(output)
    reward.eval()
    result = _evaluated(reward, output, reports, training_args)
    if trainer.is_world_process_zero():
        write_whole(output / EVALUATION_NAME, json.dumps(result.to_json(), indent=1, default=str) + "\n")
        write_whole(output / "README.md", distillation_card(reward, arguments, result))
        print(result.text())
    return result


def split_prompts(arguments: DistillArguments, seed: int) -> tuple[list[str], list[str]]:
    """Prompts to train on and to evaluate on, which have none in common.

    Raises:
        ValueError: too few of them, or held-out prompts that are trained on.
    """
    prompts = _texts(arguments.prompts, "train")
    if arguments.eval_prompts is not None:
        held_out = _texts(arguments.eval_prompts, "test")
        if common := sorted(set(prompts) & set(held_out)):
            raise ValueError(
                f"{len(common)} of the eval_prompts are trained on, such as {common[0]!r}; leave them out"
            )
        return prompts, held_out
    if len(prompts) < 2:
        raise ValueError(f"{arguments.prompts} has {len(prompts)} prompts; to hold some out there must be at least 2")
    generator = torch.Generator().manual_seed(fold_seed(seed, _SPLIT))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    count = min(max(1, round(arguments.eval_share * len(prompts))), len(prompts) - 1)
    return [prompts[i] for i in sorted(order[count:])], [prompts[i] for i in sorted(order[:count])]


def _texts(name: str, split: str) -> list[str]:
    rows = prompts_of(name, split)
    texts = [row["prompt"] if isinstance(row, dict) else row for row in rows]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))


def _reward(arguments: DistillArguments, pipeline: Any, training_args: LatentRewardTrainingConfig) -> LatentReward:
    if arguments.reward_model_path is None:
        return new_reward(arguments, pipeline, training_args.seed, training_args.device)
    from dina_reward import LatentReward

    return LatentReward.from_pretrained(arguments.reward_model_path, pipeline=pipeline, device=training_args.device)


def _label(
    labeller: JudgeLabeller,
    arguments: DistillArguments,
    pipeline: Any,
    prompts: tuple[list[str], list[str]],
    start: LatentReward | None,
    training_args: LatentRewardTrainingConfig,
    output: Path,
) -> tuple[LabelReport, LabelReport]:
    """Labels of the prompts to train on, and of those held out, which are judged at random."""
    from accelerate import PartialState

    source = PipelineSource(
        pipeline,
        arguments.height,
        arguments.width,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        max_sequence_length=arguments.max_sequence_length,
        batch_size=arguments.sample_batch_size,
    )
    held_out = max(round(arguments.eval_share * arguments.budget), labeller.calls_per_group)
    options: dict[str, Any] = {"accelerator": PartialState(), "progress": not training_args.disable_tqdm}
    seed, train = training_args.seed, output / "labels" / "train"
    report = labeller.label(train, source, prompts[0], arguments.budget - held_out, reward=start, seed=seed, **options)
    test = output / "labels" / "test"
    seed = fold_seed(seed, _HELD_OUT)
    return report, labeller.label(test, source, prompts[1], held_out, seed=seed, scales=report.scales, **options)


def _evaluated(
    reward: LatentReward,
    output: Path,
    reports: tuple[LabelReport, LabelReport],
    training_args: LatentRewardTrainingConfig,
) -> Distillation:
    pairs = CachedPreferences(output / "labels" / "test")
    ensemble = training_args.eval_ensemble_levels
    protocol = PairProtocol(
        tuple(training_args.eval_noise_levels),
        None if ensemble is None else tuple(ensemble),
        seed=training_args.eval_seed,
    )
    size = training_args.eval_batch_size
    report = evaluate_preferences(reward, pairs, protocol, batch_size=size, progress=False)
    rows = [pairs[index % len(pairs)] for index in range(_TIMED_LATENTS)]
    latents = torch.stack([row["chosen"] for row in rows]).to(reward.device)
    texts = [row["prompt"] for row in rows]
    reward(latents, texts, seed=0, batch_size=size)
    with timed() as seconds:
        reward(latents, texts, seed=0, batch_size=size)
    judged = sum(each.calls for each in reports)
    return Distillation(*reports, report, sum(each.seconds for each in reports) / judged, seconds[0] / _TIMED_LATENTS)


def distillation_card(reward: LatentReward, arguments: DistillArguments, result: Distillation) -> str:
    """The model card of a distilled reward."""
    judges = ", ".join(f"`{name}`" for name in arguments.judge)
    start = f"`{arguments.reward_model_path}`" if arguments.reward_model_path else "zero"
    return (
        f"{model_card(reward.config, reward.lora_config)}\n## Distilled from a judge\n\n"
        f"Judge: {judges}; started from {start}; samples of `{arguments.model_name_or_path}` at {arguments.width} x "
        f"{arguments.height} pixels, {arguments.num_inference_steps} steps, guidance {arguments.guidance_scale:g}.\n\n"
        f"{result.text()}\n\n"
        "It has the judge's taste and the judge's faults, on samples like those that it was distilled on. Where a policy "
        "moves away from them, refresh it (`dina_reward.distill.RewardRefresh`).\n"
    )


def read_distillation(directory: str | Path) -> dict[str, Any]:
    """What `distill` wrote of its evaluation, see `Distillation.to_json`.

    Raises:
        ValueError: there is none.
    """
    return dict(read_json(Path(directory, EVALUATION_NAME)))


def main(args: Sequence[str] | None = None) -> None:
    """Parses a command line with `ConfigParser` (``--config file.yaml`` and any field), and distils."""
    parser = ConfigParser((DistillArguments, DistillTrainingConfig))
    distill(*parser.parse_args_and_config(None if args is None else list(args)))
