"""Score latents: which of several samples fits its prompt best, and how sure is the reward?

    python examples/01_score_latents.py

Runs on the embedded world in seconds. With Stable Diffusion 3.5 the lines are the same; load the pipeline with
`StableDiffusion3Pipeline.from_pretrained` and the reward with its hub id.
"""

import torch

from dina_reward import LatentReward
from dina_reward.shapes import Oracle, decode_latents, load_pipeline, weights_dir


prompt = "a large red circle on a white background"
pipe = load_pipeline()
reward = LatentReward.from_pretrained(weights_dir("flow-reward"), pipeline=pipe, share_backbone=True)

# Eight samples of one prompt, as latents: nothing is decoded.
latents = pipe(
    [prompt] * 8,
    num_inference_steps=10,
    guidance_scale=1.0,
    max_sequence_length=6,
    output_type="latent",
    generator=torch.Generator().manual_seed(0),
).images

# One noise level, then an ensemble of three with two noise draws each. The seed makes both repeatable.
scores = reward(latents, prompt, seed=0)
output = reward.score(latents, prompt, noise_level=(0.2, 0.4, 0.6), num_noise_samples=2, seed=0)

# The embedded world has an oracle that reads images, so here the scores can be held against the truth.
fit = Oracle()(decode_latents(pipe.vae, latents), [prompt] * 8).fit

print(f"{'sample':>6} {'score':>8} {'ensemble':>9} {'+-':>6} {'oracle fit':>11}")
for i in output.scores.argsort(descending=True).tolist():
    print(f"{i:>6} {scores[i]:>8.3f} {output.scores[i]:>9.3f} {output.noise_std[i]:>6.3f} {fit[i]:>11.2f}")

# The likelihood turns a pair of scores into a probability, knowing how much noise was added.
best, worst = output.scores.argmax(), output.scores.argmin()
probability = reward.preference(latents[best, None], latents[worst, None], prompt, noise_level=0.4, seed=0)
print(f"\nP(sample {best} is preferred over sample {worst}) = {probability.item():.3f}")
