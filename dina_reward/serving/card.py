"""What a server says of itself at ``/v1/info``, so that a client refuses a wrong model before it trains on it."""

from __future__ import annotations

from typing import Any

from dina_reward import __version__
from dina_reward.reward import LatentReward
from dina_reward.serving.requests import VERSIONS
from dina_reward.serving.settings import ServingConfig
from dina_reward.training.run_settings import tensor_digest


def weights_digest(reward: LatentReward) -> str:
    """Digest of LoRA and head, as checkpoints of alignment runs hold it."""
    return tensor_digest(reward.model.trainable_state().values())


def describe(reward: LatentReward, limits: ServingConfig) -> dict[str, Any]:
    """Model, what it takes, and the server's limits, as JSON has them."""
    family, config = reward.family, reward.config
    width, pooled = family.text_sizes(config.backbone_config)
    return {
        "server_version": __version__,
        "protocol_versions": list(VERSIONS),
        "weights": weights_digest(reward),
        "device": str(reward.device),
        "dtype": str(reward.model.dtype).removeprefix("torch."),
        "config": config.to_dict(),
        "takes": {
            "latents": {
                "channels": family.latent_channels(config.backbone_config),
                "multiple": family.latent_multiple(config.backbone_config),
                "frames": family.has_frames,
            },
            "prompts": reward.prompt_encoder.pipeline is not None,
            "prompt_embeds": {"width": width, "pooled_width": pooled, "mask": family.has_text_mask},
            "max_sequence_length": config.max_sequence_length,
        },
        "limits": {
            name: getattr(limits, name)
            for name in ("max_batch_size", "max_request_rows", "max_body_bytes", "max_draws", "request_timeout")
        },
    }
