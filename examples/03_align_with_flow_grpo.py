"""Align a generator with a latent reward by Flow-GRPO; no pixel is decoded in training.

    python examples/03_align_with_flow_grpo.py

Runs on the embedded world, some seconds per iteration on two CPU cores. For Stable Diffusion 3.5 see
recipes/flow_grpo.py with recipes/configs/flow_grpo_sd35_medium.yaml.
"""

import sys

from dina_reward import LatentReward
from dina_reward.alignment import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dina_reward.shapes import load_pipeline, sample_prompts, weights_dir
from dina_reward.shapes.alignment import oracle_scores


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 20
pipe = load_pipeline()

# The reward rides on the generator's own tensors: extra memory is its LoRA and its head.
reward = LatentReward.from_pretrained(weights_dir("flow-reward"), pipeline=pipe, share_backbone=True)

arguments = DiffusionGRPOConfig(
    output_dir="outputs/my_alignment",
    max_steps=2 * iterations,
    per_device_train_batch_size=96,
    steps_per_generation=2,  # 192 samples per iteration, two optimizer steps
    num_generations=12,  # samples per prompt
    num_inference_steps=10,
    sde_type="cps",  # leaves no noise in the final latents, which the reward would see
    eta=0.8,
    sde_window_size=3,
    height=32,
    width=32,
    max_sequence_length=6,  # the longest caption of this world has six words
    learning_rate=1e-3,
    epsilon=1e-3,
    ema_decay=None,
    reward_noise_level=[0.4],
    eval_strategy="steps",
    eval_steps=2 * iterations,
    eval_on_start=True,
    eval_num_inference_steps=10,
    per_device_eval_batch_size=128,
    save_strategy="no",
    report_to="none",
)
trainer = DiffusionGRPOTrainer(
    pipe,
    reward,
    arguments,
    train_dataset=sample_prompts(256, "train", seed=0),
    eval_dataset=sample_prompts(128, "held_out", seed=1),
    eval_reward_funcs=oracle_scores,  # decodes and judges held-out samples; training never sees it
)
trainer.train()
trainer.save_model()
print("Pictures and history are in outputs/my_alignment; load the LoRA with pipe.load_lora_weights.")
