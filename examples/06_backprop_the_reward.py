"""Align a generator by back-propagating a latent reward, and let a judge that training never sees check the outcome.

    python examples/06_backprop_the_reward.py

A gradient of the reward says how to change a sample, so few samples are needed; it also finds the reward's blind spots fast.
Runs on the embedded world. For Stable Diffusion 3.5 see recipes/refl.py with recipes/configs/refl_sd35_medium.yaml.
"""

import sys

from dina_reward import LatentReward
from dina_reward.alignment import RewardBackpropConfig, RewardBackpropTrainer
from dina_reward.shapes import load_pipeline, sample_prompts, weights_dir
from dina_reward.shapes.alignment import oracle_scores


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
pipe = load_pipeline()
reward = LatentReward.from_pretrained(weights_dir("flow-reward"), pipeline=pipe, share_backbone=True)

arguments = RewardBackpropConfig(
    output_dir="outputs/my_backprop",
    max_steps=steps,
    per_device_train_batch_size=64,
    method="refl",  # one step of each rollout carries gradient; or "draft", "drtune"
    num_inference_steps=10,
    grad_step_range=[1, 5],  # drawn from the early steps, which decide what is where
    reward_noise_level=[0.8],  # hides the fine patterns that please the reward alone
    beta=2.0,  # stay near the initial model
    height=32,
    width=32,
    max_sequence_length=6,  # the longest caption of this world has six words
    learning_rate=5e-4,
    ema_decay=None,
    eval_strategy="steps",
    eval_steps=max(1, steps // 2),
    eval_on_start=True,
    eval_num_inference_steps=10,
    per_device_eval_batch_size=128,
    save_strategy="no",
    report_to="none",
)
trainer = RewardBackpropTrainer(
    pipe,
    reward,
    arguments,
    train_dataset=sample_prompts(256, "train", seed=0),
    eval_dataset=sample_prompts(128, "held_out", seed=1),
    eval_reward_funcs=oracle_scores,
)
trainer.train()
trainer.save_model()
for line in trainer.state.log_history:
    if "eval_fit" in line:
        print({name: round(line[name], 3) for name in ("step", "eval_reward", "eval_fit", "eval_cleanness")})
print("Pictures and history are in outputs/my_backprop; load the LoRA with pipe.load_lora_weights.")
