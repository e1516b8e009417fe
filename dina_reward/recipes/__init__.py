"""What the scripts in ``recipes/`` share: arguments, configuration files, and how models, rewards and data are loaded.

No algorithm is implemented here, and importing this package loads neither torch nor diffusers. Begin at
`alignment.align`, which is what every alignment recipe does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.recipes.alignment import (
        WORLDS,
        RecipeArguments,
        align,
        import_function,
        load_eval_prompts,
        load_eval_reward_funcs,
        load_models,
        load_prompts,
        load_reward_funcs,
        resume_point,
    )
    from dina_reward.recipes.arguments import ConfigParser, parse_command_line
    from dina_reward.recipes.reward_training import TrainRewardArguments, train_reward

_MODULES = {
    "ConfigParser": "arguments",
    "RecipeArguments": "alignment",
    "TrainRewardArguments": "reward_training",
    "WORLDS": "alignment",
    "align": "alignment",
    "import_function": "alignment",
    "load_eval_prompts": "alignment",
    "load_eval_reward_funcs": "alignment",
    "load_models": "alignment",
    "load_prompts": "alignment",
    "load_reward_funcs": "alignment",
    "parse_command_line": "arguments",
    "resume_point": "alignment",
    "train_reward": "reward_training",
}

__all__ = [
    "WORLDS",
    "ConfigParser",
    "RecipeArguments",
    "TrainRewardArguments",
    "align",
    "import_function",
    "load_eval_prompts",
    "load_eval_reward_funcs",
    "load_models",
    "load_prompts",
    "load_reward_funcs",
    "parse_command_line",
    "resume_point",
    "train_reward",
]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
