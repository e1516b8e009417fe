"""The reward network: a truncated backbone with LoRA, and a head."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from dina_reward.families import Backbone, Conditioning, ModelFamily, TapFeatures
from dina_reward.modeling.config import LatentRewardConfig
from dina_reward.modeling.heads import build_head
from dina_reward.modeling.heads.ensemble import EnsembleHead
from dina_reward.modeling.lora import add_lora


class LatentRewardModel(nn.Module):
    """Backbone (LoRA-wrapped) and head.

    LoRA and head parameters are float32 whatever the backbone's dtype, and are the only parameters that ever train.

    Args:
        config: the reward's configuration.
        family: its model family.
        backbone: truncated view of the denoiser.
        lora_config: PEFT configuration; see `default_lora_config`.
    """

    def __init__(
        self, config: LatentRewardConfig, family: ModelFamily, backbone: Backbone, lora_config: LoraConfig
    ) -> None:
        super().__init__()
        self.config = config
        backbone.requires_grad_(False)
        self.backbone: PeftModel = add_lora(backbone, lora_config)
        assert config.text_taps is not None
        self.head = build_head(
            config.head,
            family.feature_sizes(config.backbone_config).at(config.visual_taps),
            num_visual_taps=len(config.visual_taps),
            num_text_taps=len(config.text_taps),
        ).to(self.device)

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the backbone computes in."""
        return next(
            p for name, p in self.backbone.named_parameters() if "lora_" not in name and p.is_floating_point()
        ).dtype

    def trainable_state(self) -> dict[str, nn.Parameter]:
        """LoRA and head parameters by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("head.") or ".lora_" in name
        }

    def set_trainable(self, trainable: bool, *, lora: bool = True) -> None:
        """Switches gradients of LoRA and head parameters; the base weights stay frozen.

        Args:
            trainable: whether they get gradients.
            lora: false leaves the LoRA frozen in any case.
        """
        for name, parameter in self.trainable_state().items():
            parameter.requires_grad_(trainable and (lora or name.startswith("head.")))

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes block activations in the backward pass."""
        self._truncated.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keeps block activations for the backward pass."""
        self._truncated.gradient_checkpointing = False

    @property
    def _truncated(self) -> Backbone:
        return self.backbone.get_base_model()  # type: ignore[return-value]

    def features(
        self, noisy_latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        """Tapped hidden states of noisy latents; arguments as for `forward`."""
        dtype, device = self.dtype, self.device
        return self.backbone(
            noisy_latents.to(dtype),
            timestep.to(device),
            conditioning.to(device, dtype),
            None if prompt_index is None else prompt_index.to(device),
        )

    def head_scores(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Scores of every member of the head, shape ``(members, rows / num_levels)``, float32; most heads have one."""
        if isinstance(self.head, EnsembleHead):
            return self.head.member_scores(features, num_levels)
        return self.head(features, num_levels)[None]

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        prompt_index: Tensor | None = None,
        num_levels: int = 1,
        members: bool = False,
    ) -> Tensor:
        """Scores noisy latents.

        Args:
            noisy_latents (`Tensor`): shape ``(rows, ...)`` with ``rows = num_levels * batch``, level-major.
            timestep (`Tensor`): scheduler timesteps, shape ``(rows,)``.
            conditioning (`Conditioning`): encoded unique prompts.
            prompt_index (`Tensor`, *optional*): prompt of every row, shape ``(rows,)``; default row ``i``, prompt ``i``.
            num_levels (`int`): levels of a token ensemble.
            members (`bool`): return the scores of each member of the head.

        Returns:
            `Tensor`: raw scores, shape ``(batch,)``, float32; with ``members``, ``(members, batch)``.
        """
        features = self.features(noisy_latents, timestep, conditioning, prompt_index)
        return self.head_scores(features, num_levels) if members else self.head(features, num_levels)
