"""What the alignment recipes share: their arguments, and how generator, rewards and prompts are loaded.

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_reward.checks.values import check_choice, check_int
from dina_reward.quiet import dtype_option
from dina_reward.recipes.refreshing import RefreshArguments, living_callbacks
from dina_reward.shipped import WORLDS


if TYPE_CHECKING:
    import torch

    from dina_reward import LatentReward, RemoteReward
    from dina_reward.alignment import AlignmentConfig, AlignmentTrainer


DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that frozen weights may have."""

ALGORITHMS = {
    "flow_grpo": ("DiffusionGRPOConfig", "DiffusionGRPOTrainer"),
    "grpo": ("DiffusionGRPOConfig", "DiffusionGRPOTrainer"),
    "ddpo": ("DDPOConfig", "DDPOTrainer"),
    "nft": ("DiffusionNFTConfig", "DiffusionNFTTrainer"),
    "online_dpo": ("OnlineDPOConfig", "OnlineDPOTrainer"),
    "refl": ("RewardBackpropConfig", "RewardBackpropTrainer"),
    "distill_search": ("SearchDistillationConfig", "SearchDistillationTrainer"),
}
"""Configuration and trainer, of `dina_reward.alignment` or `dina_reward.search`, by the name of the recipe's script."""


@dataclass
class RecipeArguments(RefreshArguments):
    """What to align with which reward on which prompts."""

    model_name_or_path: str = field(
        metadata={"help": "Diffusers pipeline (hub id or path), or 'shapes' or 'shapes-ddpm', which are embedded."}
    )
    reward_model_path: str = field(
        metadata={
            "help": "LatentReward checkpoint (hub id or path), 'shapes', 'shapes-ddpm', or addresses of scoring servers, as "
            "http://host:8000,http://other:8000."
        }
    )
    dataset_name: str = field(
        metadata={
            "help": "Prompts: a folder of SPLIT.txt files with one per line, a dataset with a prompt column, or 'shapes'."
        }
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default="test", metadata={"help": "Held-out split; null for none."})
    max_eval_prompts: int = field(default=128, metadata={"help": "Evaluate on the first so many held-out prompts."})
    torch_dtype: str = field(default="float32", metadata={"help": "Dtype of the frozen weights: float32, bfloat16."})
    share_backbone: bool = field(
        default=True, metadata={"help": "Let the reward run on the generator's own weights instead of a copy."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Further rewards, as 'module.function'; reward_weights then needs one weight per reward."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Held-out judges that training never sees, as 'module.function'."}
    )

    def __post_init__(self) -> None:
        check_choice("torch_dtype", self.torch_dtype, DTYPES)
        check_int(self, "max_eval_prompts", 1)
        super().__post_init__()


def align(
    trainer_class: type[AlignmentTrainer], arguments: RecipeArguments, config: AlignmentConfig
) -> AlignmentTrainer:
    """What every alignment recipe does: loads, trains, and writes weights and the trainer's state to ``output_dir``.

    Args:
        trainer_class: the algorithm.
        arguments: what to align with which reward on which prompts.
        config: settings of the algorithm.
    """
    pipeline, reward = load_models(arguments, config.device)
    trainer = trainer_class(
        pipeline,
        load_reward_funcs(arguments, reward),
        config,
        train_dataset=load_prompts(arguments, config.seed),
        eval_dataset=load_eval_prompts(arguments),
        eval_reward_funcs=load_eval_reward_funcs(arguments),
        callbacks=living_callbacks(arguments, reward),
    )
    trainer.train(resume_from_checkpoint=resume_point(config.resume_from_checkpoint))
    trainer.save_model()
    trainer.save_state()
    return trainer


def main(algorithm: str, args: Sequence[str]) -> None:
    """Parses a command line as the recipe of an algorithm does, and aligns.

    Raises:
        ValueError: no such algorithm, or options that do not fit.
    """
    from dina_reward.recipes.arguments import ConfigParser, did_you_mean

    if algorithm not in ALGORITHMS:
        guess = did_you_mean(algorithm, ALGORITHMS)
        raise ValueError(f"no algorithm {algorithm!r}{guess or '; there are ' + ', '.join(ALGORITHMS)}")
    config_class, trainer_class = classes_of(algorithm)
    arguments, config = ConfigParser((RecipeArguments, config_class)).parse_args_and_config(args)
    align(trainer_class, arguments, config)


def classes_of(algorithm: str) -> tuple[type[AlignmentConfig], type[AlignmentTrainer]]:
    """Configuration and trainer of an algorithm."""
    from dina_reward import alignment, search

    config_class, trainer_class = ALGORITHMS[algorithm]
    home = search if trainer_class in search.__all__ else alignment
    return getattr(home, config_class), getattr(home, trainer_class)


def load_models(arguments: RecipeArguments, device: torch.device | str) -> tuple[Any, LatentReward | RemoteReward]:
    """Generator and latent reward on one device; or a reward on servers, where its path is their address.

    Raises:
        ValueError: unknown dtype, a generator of no supported family (found before its weights are fetched), or a reward
            that does not fit the generator.
    """
    from dina_reward import LatentReward, RemoteReward
    from dina_reward.serving.remote import remote_urls

    pipeline = load_generator(arguments.model_name_or_path, arguments.torch_dtype, device)
    path = arguments.reward_model_path
    if urls := list(remote_urls(path)):
        return pipeline, RemoteReward(urls)
    return pipeline, LatentReward.from_pretrained(path, pipeline=pipeline, share_backbone=arguments.share_backbone)


def load_generator(name: str, dtype_name: str, device: torch.device | str) -> Any:
    """A whole pipeline on a device, without progress bars.

    Raises:
        ValueError: unknown dtype, or a generator of no supported family (found before its weights are fetched).
    """
    dtype = torch_dtype(dtype_name)
    pipeline: Any
    if name in WORLDS:
        from dina_reward.shapes import load_pipeline

        pipeline = load_pipeline(WORLDS[name], **dtype_option(dtype))
    else:
        from dina_reward.backbones.pipelines import load_pipeline as open_pipeline

        pipeline = open_pipeline(name, dtype=dtype, **_loading_options(name))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_reward_funcs(arguments: RecipeArguments, latent_reward: Any) -> list[Any]:
    """The latent reward and the further rewards that training maximises."""
    return [latent_reward, *map(import_function, arguments.reward_funcs or ())]


def load_prompts(arguments: RecipeArguments, seed: int) -> Any:
    """Prompts to train on; ``seed`` orders those of the embedded world."""
    if arguments.dataset_name in WORLDS:
        from dina_reward.shapes.alignment import training_prompts

        return training_prompts(seed)
    return prompts_of(arguments.dataset_name, arguments.dataset_train_split)


def load_eval_prompts(arguments: RecipeArguments) -> list[Any] | None:
    """The first `max_eval_prompts` held-out prompts; ``None`` without a test split."""
    if arguments.dataset_test_split is None:
        return None
    if arguments.dataset_name in WORLDS:
        from dina_reward.shapes.alignment import held_out_prompts

        prompts: Any = held_out_prompts()
    else:
        prompts = prompts_of(arguments.dataset_name, arguments.dataset_test_split)
    return [prompts[index] for index in range(min(arguments.max_eval_prompts, len(prompts)))]


def load_eval_reward_funcs(arguments: RecipeArguments) -> list[Any]:
    """Judges of held-out images that training never sees; on the embedded world's captions the oracle is one."""
    judges = [import_function(name) for name in arguments.eval_reward_funcs or ()]
    if arguments.dataset_name in WORLDS:
        from dina_reward.shapes.alignment import oracle_scores

        judges.append(oracle_scores)
    return judges


def resume_point(resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """What `Trainer.train` expects for ``--resume_from_checkpoint true`` (the last one), ``false``, or a path."""
    words: dict[str, bool | None] = {"true": True, "false": None}
    return words.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)


def import_function(name: str) -> Callable[..., Any]:
    """A callable by its dotted name.

    Raises:
        ValueError: no such module, or no such callable in it.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        function = getattr(import_module(module_name), attribute) if module_name else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"{name!r} must be the dotted name of a callable, such as 'my_rewards.sharpness'")
    return function


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by its name; a `ValueError` for another name."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch_dtype must name a torch dtype such as 'bfloat16', got {name!r}")
    return dtype


def _loading_options(name: str) -> dict[str, Any]:
    """Reads a pipeline's index alone: refuses families that are not supported, and leaves out the safety checker."""
    from dina_reward.backbones.pipelines import pipeline_index

    index = pipeline_index(name)
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def prompts_of(name: str, split: str) -> Sequence[Any]:
    """Prompts by name: a text file, a folder of SPLIT.txt, a dataset with a prompt column, or a world of shapes."""
    if name in WORLDS:
        from dina_reward.shapes.alignment import held_out_prompts, training_prompts

        return training_prompts(0) if split == "train" else held_out_prompts()
    path = Path(name) if name.endswith(".txt") else Path(name, f"{split}.txt")
    if path.is_file():
        from dina_reward.data.files import read_lines

        return read_lines(path)
    from datasets import load_dataset

    return load_dataset(name, split=split)
