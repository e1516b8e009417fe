"""Align with two rewards at once, watched by a judge that training never sees.

    python examples/05_two_rewards_and_a_held_out_judge.py

Any callable is a reward: it names the arguments it wants (latents, prompts, columns of the dataset, ...) and returns one
number per sample, or None where it does not apply. One that names `images` makes the run decode; these two do not.
"""

import sys

from dina_reward import LatentReward
from dina_reward.alignment import DiffusionGRPOTrainer, RewardHackingCallback
from dina_reward.shapes import load_pipeline, sample_prompts, weights_dir
from dina_reward.shapes.alignment import alignment_config, oracle_scores


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 20
pipe = load_pipeline()
reward = LatentReward.from_pretrained(weights_dir("flow-reward"), pipeline=pipe, share_backbone=True)


def calm_background(latents, prompts):
    """Little variation at the border of the latent; only where the prompt asks for a small shape."""
    border = latents.float().clone()
    border[..., 1:-1, 1:-1] = border.mean(dim=(-2, -1), keepdim=True)
    spread = border.std(dim=(-2, -1)).mean(dim=1).tolist()
    return [-value if "small" in prompt else None for value, prompt in zip(spread, prompts, strict=True)]


arguments = alignment_config(
    "outputs/two_rewards",
    iterations=iterations,
    evaluate_every=max(1, iterations // 2),
    reward_weights=[1.0, 0.3],
    multi_objective_aggregation="normalize_then_sum",  # each reward normalised first: no scale drowns the other
    hacking_stop=False,
)
trainer = DiffusionGRPOTrainer(
    pipe,
    [reward, calm_background],
    arguments,
    train_dataset=sample_prompts(256, "train", seed=0),
    eval_dataset=sample_prompts(128, "held_out", seed=1),
    eval_reward_funcs=oracle_scores,  # decodes and judges held-out samples only
    callbacks=[RewardHackingCallback(window=3, on_reward_hacking=lambda alarm: print("ALARM:", alarm.message))],
)
trainer.train()
for line in trainer.state.log_history:
    if "eval_fit" in line:
        print({name: round(line[name], 3) for name in ("step", "eval_reward", "eval_fit", "eval_cleanness")})
print("Pictures and history are in outputs/two_rewards.")
