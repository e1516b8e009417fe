"""Train a latent reward on preference pairs: a LoRA on the first blocks of a generator, and a head.

    python examples/02_train_a_reward.py

The embedded world labels as many pairs as one wants; a real data set has the same columns (prompt, chosen, rejected).
A few minutes on two CPU cores; the shipped reward saw more pairs for longer (python -m dina_reward.shapes.build).
"""

import sys

from dina_reward import LatentReward, default_lora_config, default_reward_config
from dina_reward.evaluation import evaluate_preferences
from dina_reward.shapes import build_pool, load_pipeline, sample_pairs
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
output_dir = "outputs/my_reward"
pipe = load_pipeline()

# Pairs of latents: renders, degraded renders and samples of the generator, labelled by the oracle with some label noise.
train_pairs = sample_pairs(build_pool(pipe, "train", count=600, seed=0), "train", count=10_000, seed=0)
held_out = sample_pairs(build_pool(pipe, "held_out", count=100, seed=1), "held_out", count=400, seed=1)
clear_pairs = [pair for pair in held_out if pair["gap"] > 0.1]

# The reward reads the first four blocks of the generator's five, after the second, third and fourth.
config = default_reward_config(pipe, num_layers=4, visual_taps=(2, 3, 4), max_sequence_length=6)
reward = LatentReward.from_config(config, pipeline=pipe, lora_config=default_lora_config(config, rank=16), seed=0)

arguments = LatentRewardTrainingConfig(
    output_dir=output_dir,
    max_steps=steps,
    per_device_train_batch_size=64,
    learning_rate=1e-3,
    warmup_steps=steps // 10,
    lr_scheduler_type="cosine",
    save_strategy="no",
    report_to="none",
    logging_steps=20,
)
trainer = LatentRewardTrainer(reward, arguments, train_dataset=train_pairs)
trainer.train()
trainer.save_model(output_dir)

# Load it back as a user would, and ask how often it is right at each noise level.
trained = LatentReward.from_pretrained(output_dir, pipeline=pipe)
report = evaluate_preferences(trained, clear_pairs)
print(report.table())
print(f"\nThe reward is in {output_dir}.")
