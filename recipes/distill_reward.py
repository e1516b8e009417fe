"""Makes a latent reward of a generator's samples and a judge's opinion of them: draws, has judged, trains, evaluates.

    python recipes/distill_reward.py --config recipes/configs/distill_shapes.yaml
    python recipes/distill_reward.py --config recipes/configs/distill_pickscore_sd35_medium.yaml --prompts prompts.txt

The judge is anything that scores images (or latents) or compares two: a Python function, a CLIP-type model, a vision model
behind an endpoint, a program; see `dina_reward.distill.naming`. Labels, answers and checkpoints are written as they come: a
run that was killed goes on with `--resume_from_checkpoint true`, and asks the judge nothing twice.

Any field of `DistillArguments` and `DistillTrainingConfig` may stand in the YAML file or on the command line, which wins; an
unknown key is an error.
"""

from dina_reward.recipes.arguments import parse_command_line
from dina_reward.recipes.distillation import DistillArguments, DistillTrainingConfig
from dina_reward.recipes.distillation import distill as main


if __name__ == "__main__":
    main(*parse_command_line(DistillArguments, DistillTrainingConfig))
