"""The model card that is saved with a reward checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from peft import LoraConfig

    from dina_reward.modeling import LatentRewardConfig


CARD_HEADER = "library_name: dina_reward"
"""A line of every card that `model_card` makes."""


def model_card(config: LatentRewardConfig, lora_config: LoraConfig) -> str:
    """Markdown with the hub's metadata header, the reward's settings and how to use it."""
    backbone = config.backbone_model_id
    on_hub = backbone is not None and "/" in backbone and not backbone.startswith((".", "/"))
    header = [CARD_HEADER, "tags:", "- reward-model", "- diffusion", "- lora", "- arxiv:2602.11146"]
    if on_hub:
        header.insert(0, f"base_model: {backbone}")
    variance = f"Thurstone, variance {config.variance_scale} sigma^2 + {config.variance_offset}"
    rows = [
        ("Backbone", f"`{backbone or 'not recorded'}`, first {config.num_layers} blocks"),
        ("Image taps", ", ".join(map(str, config.visual_taps))),
        ("Text taps", ", ".join(map(str, config.text_taps or ())) if config.head.use_text_features else "not read"),
        ("Head", config.head.kind),
        ("LoRA", f"rank {lora_config.r}, alpha {lora_config.lora_alpha}"),
        ("Default noise level", config.noise_level),
        ("Likelihood", variance if config.likelihood == "thurstone" else "Bradley-Terry"),
        ("Normalised score", f"(raw + {config.score_shift}) / {config.score_scale}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\n" + "\n".join(header) + "\n---\n\n# Latent reward\n\n"
        "A reward that reads diffusion latents: it scores how well a latent fits its prompt without decoding it "
        "(DiNa-LRM, arXiv 2602.11146).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom dina_reward import LatentReward\n\n"
        'reward = LatentReward.from_pretrained("path/or/id", pipeline=pipe)\n'
        'latents = pipe(prompt=prompt, output_type="latent").images\nscores = reward(latents, [prompt])\n```\n'
    )
