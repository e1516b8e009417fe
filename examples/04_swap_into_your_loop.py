"""Put the reward into a training loop of your own: every line that it takes is marked with "+ reward".

    python examples/04_swap_into_your_loop.py

A plain diffusers loop that fine-tunes a LoRA of a Stable Diffusion pipeline on its own samples. Without the reward
(`--no-reward`) all samples count alike, and little changes; with it, better samples count more. Some seconds per round
on two CPU cores. For another model, change the two lines that load pipeline and reward.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from peft import LoraConfig

from dina_reward import LatentReward  # + reward
from dina_reward.shapes import Oracle, load_pipeline, sample_prompts, weights_dir


GROUP = 8  # samples per prompt
PROMPTS = 24  # prompts per round

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=12)
parser.add_argument("--no-reward", action="store_true", help="the loop as it was before")
arguments = parser.parse_args()

torch.manual_seed(0)
pipe = load_pipeline("ddpm")
pipe.set_progress_bar_config(disable=True)
reward = LatentReward.from_pretrained(weights_dir("ddpm-reward"), pipeline=pipe, share_backbone=True)  # + reward

unet, scheduler = pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config)
unet.requires_grad_(False)
unet.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=3e-3)


def sample(prompts: list[str], seed: int) -> torch.Tensor:
    """Latents, straight from the pipeline; nothing is decoded."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "generator": generator}
    return pipe(prompt=prompts, output_type="latent", **settings).images


def oracle_fit(seed: int = 1) -> float:
    """How many attributes of held-out prompts are right, in the eyes of a judge that training never sees."""
    prompts = sample_prompts(96, "held_out", seed=seed)
    latents = sample(prompts, seed)
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return float(Oracle()((images / 2 + 0.5).clamp(0, 1), prompts).fit.mean())


print(f"before: oracle fit {oracle_fit():.3f}")
for number in range(arguments.rounds):
    prompts = [prompt for prompt in sample_prompts(PROMPTS, "train", seed=number) for _ in range(GROUP)]
    latents = sample(prompts, seed=1000 + number)
    weights = torch.ones(len(prompts))
    if not arguments.no_reward:
        # One seed per group: its members are compared under the same noise.
        seeds = [index // GROUP for index in range(len(prompts))]  # + reward
        scores = reward(latents, prompts, noise_level=0.4, seed=seeds)  # + reward
        weights = GROUP * scores.view(-1, GROUP).mul(2).softmax(dim=1).flatten()  # + reward

    with torch.no_grad():
        prompt_embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    for _ in range(4):
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(prompts),))
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
        loss = (weights * F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    print(f"round {number + 1}: loss {loss.item():.4f}")
print(f"after:  oracle fit {oracle_fit():.3f}")
