"""Make a latent reward out of a judge, align with it, and keep it true while the policy moves.

    python examples/09_distill_a_judge_and_refresh.py

The judge is a function of images and prompts that is trusted and too slow for the loop: here it looks at how high up the
shape stands, which no shipped reward knows. It is asked a few hundred times; the loop scores latents.
"""

import sys

from dina_reward import LatentReward, default_lora_config, default_reward_config
from dina_reward.alignment import DiffusionNFTTrainer
from dina_reward.data import CachedPreferences
from dina_reward.distill import JudgeLabeller, JudgeLimits, PipelineSource, RefreshSettings, RewardRefresh
from dina_reward.evaluation import evaluate_preferences
from dina_reward.shapes import load_pipeline, sample_prompts
from dina_reward.shapes.alignment import nft_config
from dina_reward.shapes.judges import height_in_picture, in_upper_half
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


steps, iterations = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (150, 20)
budget = 12 * steps
output = "outputs/distilled"
pipe = load_pipeline()
prompts, held_out = sample_prompts(288, "train", seed=0), sample_prompts(48, "held_out", seed=1)

# Samples of the generator, scored by the judge in groups of one prompt: all pairs of a group become preferences.
labeller = JudgeLabeller(height_in_picture, limits=JudgeLimits(batch_size=48))
source = PipelineSource(pipe, 32, 32, num_inference_steps=6, max_sequence_length=6, batch_size=48)
print(labeller.label(f"{output}/train", source, prompts, budget))
print(labeller.label(f"{output}/test", source, held_out, max(budget // 5, 12), seed=1))

# From zero: a LoRA on the generator's own frozen blocks, and a head.
config = default_reward_config(pipe, num_layers=4, visual_taps=(2, 3, 4), max_sequence_length=6)
lora = default_lora_config(config, rank=16)
reward = LatentReward.from_config(config, pipeline=pipe, lora_config=lora, share_backbone=True)
arguments = LatentRewardTrainingConfig(
    f"{output}/training", max_steps=steps, per_device_train_batch_size=64, learning_rate=1e-3,
    loss_type="thurstone_nll", save_strategy="no", report_to="none", use_cpu=True,
)  # fmt: skip
LatentRewardTrainer(reward, arguments, train_dataset=CachedPreferences(f"{output}/train")).train()
print(evaluate_preferences(reward.eval(), CachedPreferences(f"{output}/test"), progress=False).table())

# The loop never decodes; every fifth generation the judge sees a few samples of the policy, and the reward learns from them.
settings = RefreshSettings(every=5, budget=48, audit_budget=24, steps=max(steps // 5, 1), learning_rate=3e-4)
refresh = RewardRefresh(labeller, reward, settings, replay=CachedPreferences(f"{output}/train"))
every = max(1, iterations // 2)
run = nft_config(f"{output}/alignment", iterations=iterations, evaluate_every=every, per_device_train_batch_size=48)
data = {"train_dataset": prompts, "eval_dataset": held_out, "eval_reward_funcs": in_upper_half}
trainer = DiffusionNFTTrainer(pipe, reward, run, callbacks=[refresh], **data)
trainer.train()
print(f"{refresh.judge_calls} judgements in {len(refresh.records)} refreshes")
