"""Reward training from a configuration: what `recipes/train_reward.py` and ``dina-reward train`` run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.backbones.pipelines import load_pipeline as open_pipeline
from dina_reward.backbones.pipelines import pipeline_index
from dina_reward.checks.values import check_choice, check_fields
from dina_reward.data import load_preferences
from dina_reward.data.cache_manifest import is_cache
from dina_reward.data.storage import TENSORS_NAME
from dina_reward.evaluation import evaluate_preferences, plot_evaluation
from dina_reward.families import family_of
from dina_reward.likelihood import preference_model
from dina_reward.modeling import default_lora_config, default_reward_config
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.quiet import dtype_option
from dina_reward.recipes.alignment import DTYPES, resume_point, torch_dtype
from dina_reward.recipes.arguments import ConfigParser
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig
from dina_reward.training.batching import FirstRows, has_buckets


SHAPES = "shapes"
_SHAPES_PAIRS = 20_000


@dataclass
class RewardArguments:
    """What kind of reward to train on which generator.

    Raises:
        ValueError: the settings of head and likelihood do not fit together.
    """

    model_name_or_path: str = field(
        metadata={"help": "Diffusers pipeline (hub id or path) whose denoiser becomes the backbone, or 'shapes'."}
    )
    _: KW_ONLY
    torch_dtype: str = field(default="float32", metadata={"help": "Dtype of the frozen backbone: float32, bfloat16."})
    num_layers: int | None = field(
        default=None, metadata={"help": "Blocks of the backbone that run; null: the default for the model."}
    )
    visual_taps: list[int] | None = field(
        default=None,
        metadata={"help": "Blocks (from 1) after which image tokens are read; null: the default for the model."},
    )
    text_taps: list[int] | None = field(
        default=None, metadata={"help": "The same for text; null: visual_taps, or none if the head reads no text."}
    )
    head_kind: str = field(
        default="query",
        metadata={"help": "'query' (attention), 'pooled' (averaged tokens and an MLP) or 'conv' (convolutions)."},
    )
    head_width: int | None = field(
        default=None, metadata={"help": "Width of the head; null: the default for the model."}
    )
    head_layers: int = field(default=2, metadata={"help": "Hidden layers of a 'pooled' or 'conv' head."})
    head_members: int = field(
        default=1, metadata={"help": "Heads on one backbone pass; their spread says how unsure the reward is."}
    )
    use_text_features: bool | None = field(
        default=None, metadata={"help": "Whether the head reads text tokens; null: only 'query' does."}
    )
    use_time_embedding: bool | None = field(
        default=None, metadata={"help": "Whether the head is told the noise level; null: only 'query' is."}
    )
    likelihood: str = field(
        default="thurstone",
        metadata={"help": "From scores to preferences: 'thurstone' or 'bradley_terry'; loss_type has to fit it."},
    )
    noise_level: list[float] = field(
        default_factory=lambda: [0.4],
        metadata={"help": "Level, or levels of an ensemble, that the finished reward scores at by default."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Store the frozen weights of the blocks in 4 bits (QLoRA, arXiv 2305.14314)."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=128, metadata={"help": "Alpha of the LoRA, usually 2 * rank."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Token limit of prompts; null: default."})
    variance_scale: float = field(default=2.0, metadata={"help": "k of the Thurstone variance k sigma^2 + c."})
    variance_offset: float = field(default=0.05, metadata={"help": "c of the Thurstone variance."})

    def __post_init__(self) -> None:
        check_choice("torch_dtype", self.torch_dtype, DTYPES)
        check_fields(self, lora_r=(1, 65_536), lora_alpha=(1, 1e6), noise_level=(0, 1))
        head_config(self, self.head_width)
        preference_model(self.likelihood, self.variance_scale, self.variance_offset)  # type: ignore[arg-type]
        if not self.noise_level:
            raise ValueError("noise_level is empty; name at least one level, e.g. [0.4]")


@dataclass
class TrainRewardArguments(RewardArguments):
    """What to train on what."""

    dataset_name: str = field(
        metadata={"help": "Preferences: see dina_reward.data.load_preferences; 'shapes' makes them on the spot."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default="test", metadata={"help": "Split to evaluate on; null for none."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    max_eval_pairs: int | None = field(default=None, metadata={"help": "Evaluate on the first so many pairs."})
    min_confidence: float | None = field(
        default=None,
        metadata={
            "help": "Of published latents: leave out pairs whose annotators were less sure. A cache has it already."
        },
    )
    max_pairs_per_prompt: int | None = field(
        default=None, metadata={"help": "Of published latents: leave out pairs where a prompt has more; published: 8."}
    )

    def __post_init__(self) -> None:
        check_fields(self, max_train_pairs=(1, math.inf))
        super().__post_init__()


def head_config(arguments: RewardArguments, width: int | None) -> RewardHeadConfig:
    """Shape of the head that the arguments ask for, with this width."""
    return RewardHeadConfig(
        kind=arguments.head_kind,  # type: ignore[arg-type]
        width=width,
        use_text_features=arguments.use_text_features,
        use_time_embedding=arguments.use_time_embedding,
        num_hidden_layers=arguments.head_layers,
        num_members=arguments.head_members,
    )


def load_pipeline(arguments: TrainRewardArguments, *, text_encoders: bool = True) -> Any:
    """The pipeline that gives backbone, scheduler and text encoders; no autoencoder, since nothing is decoded.

    Args:
        text_encoders: load them; not needed where the dataset holds prompt embeddings.
    """
    dtype = torch_dtype(arguments.torch_dtype)
    if arguments.model_name_or_path == SHAPES:
        from dina_reward.shapes import load_pipeline as load_shapes

        return load_shapes(**dtype_option(dtype))
    name, absent = arguments.model_name_or_path, {"vae": None}
    if not text_encoders:
        absent |= {part: None for part in pipeline_index(name) if part.startswith("text_encoder")}
    return open_pipeline(name, dtype=dtype, **absent)


def load_pairs(arguments: TrainRewardArguments, split: str, limit: int | None) -> Any:
    """Preference records of one split, at most `limit`.

    Raises:
        ValueError: one set of pairs is asked for as two different splits.
    """
    place = Path(arguments.dataset_name)
    undivided = place.is_file() or is_cache(place)
    undivided |= any((place / name).exists() for name in (TENSORS_NAME, "dataset_info.json"))
    if undivided and arguments.dataset_test_split not in (None, arguments.dataset_train_split):
        raise ValueError(
            f"{place} holds one set of pairs, which would be trained and tested on; keep one directory per split in it "
            f"({arguments.dataset_train_split}, {arguments.dataset_test_split}), or set dataset_test_split to null"
        )
    pairs: Any = load_preferences(
        arguments.dataset_name,
        split,
        min_confidence=arguments.min_confidence,
        max_pairs_per_prompt=arguments.max_pairs_per_prompt,
    )
    return pairs if limit is None else FirstRows(pairs, limit)


def load_inputs(arguments: TrainRewardArguments, seed: int) -> tuple[Any, Any, Any]:
    """Pipeline, training pairs and evaluation pairs (``None`` without a test split)."""
    train, test = arguments.dataset_train_split, arguments.dataset_test_split
    if arguments.dataset_name == SHAPES:
        from dina_reward.shapes import fresh_preferences

        pipeline = load_pipeline(arguments)
        pairs = fresh_preferences(pipeline, train, arguments.max_train_pairs or _SHAPES_PAIRS, seed)
        held_out = None
        if test is not None:
            held_out = fresh_preferences(pipeline, test, arguments.max_eval_pairs or _SHAPES_PAIRS, seed + 1)
        return pipeline, pairs, held_out
    pairs = load_pairs(arguments, train, arguments.max_train_pairs)
    held_out = None if test is None else load_pairs(arguments, test, arguments.max_eval_pairs)
    encoded = all(part is None or part[0].get("prompt_embeds") is not None for part in (pairs, held_out))
    return load_pipeline(arguments, text_encoders=not encoded), pairs, held_out


def reward_config(arguments: RewardArguments, pipeline: Any) -> LatentRewardConfig:
    """Configuration of the reward; what the arguments leave open is the default for the pipeline's model.

    Raises:
        ValueError: only one of num_layers and visual_taps is given, or the values do not fit together.
    """
    if (arguments.num_layers is None) != (arguments.visual_taps is None):
        raise ValueError(
            f"num_layers is {arguments.num_layers} and visual_taps is {arguments.visual_taps}; give both, or neither for "
            "the defaults of the model"
        )
    levels = arguments.noise_level
    settings: dict[str, Any] = {
        "backbone_model_id": arguments.model_name_or_path,
        "text_taps": arguments.text_taps,
        "likelihood": arguments.likelihood,
        "variance_scale": arguments.variance_scale,
        "variance_offset": arguments.variance_offset,
        "noise_level": levels[0] if len(levels) == 1 else tuple(levels),
        "max_sequence_length": arguments.max_sequence_length,
    }
    if arguments.num_layers is not None and arguments.visual_taps is not None:
        settings |= {"num_layers": arguments.num_layers, "visual_taps": tuple(arguments.visual_taps)}
    width = arguments.head_width or default_reward_config(pipeline).head.width
    return default_reward_config(pipeline, head=head_config(arguments, width), **settings)


def new_reward(
    arguments: RewardArguments, pipeline: Any, seed: int, device: torch.device | str | None = None
) -> LatentReward:
    """An untrained reward on the first blocks of the pipeline's denoiser."""
    config = reward_config(arguments, pipeline)
    lora = default_lora_config(config, rank=arguments.lora_r, alpha=arguments.lora_alpha)
    return LatentReward.from_config(
        config, pipeline=pipeline, lora_config=lora, seed=seed, device=device, load_in_4bit=arguments.load_in_4bit
    )


def place_text_encoders(pipeline: Any, device: torch.device | str) -> None:
    """Puts everything but the denoiser onto the device: the reward has a copy of the part of it that runs."""
    denoiser = family_of(pipeline).denoiser_attribute
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name != denoiser:
            part.to(device)


def train_reward(arguments: TrainRewardArguments, training_args: LatentRewardTrainingConfig) -> None:
    """Trains, saves to ``output_dir`` and, with a test split, prints and draws the evaluation."""
    output_dir = training_args.output_dir
    assert output_dir is not None
    pipeline, train_pairs, test_pairs = load_inputs(arguments, training_args.seed)
    reward = new_reward(arguments, pipeline, training_args.seed, training_args.device)
    place_text_encoders(pipeline, training_args.device)

    trainer = LatentRewardTrainer(reward, training_args, train_dataset=train_pairs, eval_dataset=test_pairs)
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model(output_dir)
    trainer.save_state()
    if test_pairs is None:
        return
    if has_buckets(test_pairs) or trainer.is_fsdp_enabled:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(*(f"{name}: {value:.4f}" for name, value in metrics.items()), sep="\n")
    elif trainer.is_world_process_zero():
        reward.load_weights(output_dir)
        report = evaluate_preferences(reward.eval(), test_pairs, batch_size=training_args.eval_batch_size)
        plot_evaluation(report, Path(output_dir, "evaluation.png"))
        print(report.table(), report.calibration_table("ensemble"), sep="\n\n")


def main(args: Sequence[str] | None = None) -> None:
    """Parses a command line with `ConfigParser` (``--config file.yaml`` and any field), and trains.

    Args:
        args: the command line, by default that of the process; its first word may be the name of a configuration.
    """
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    parser = ConfigParser((TrainRewardArguments, LatentRewardTrainingConfig))
    train_reward(*parser.parse_args_and_config(None if args is None else list(args)))
