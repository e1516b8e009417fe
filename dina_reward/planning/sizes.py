"""Sizes of the parts of a run, counted on the meta device: parameters, FLOPs, what a backward pass keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.backbones.cards import BackboneCard, card_of, meta_pipeline
from dina_reward.backbones.quantization import block_linears
from dina_reward.backbones.structures import ModelStructure
from dina_reward.families import Conditioning, ModelFamily
from dina_reward.modeling import LatentRewardModel, default_lora_config, default_reward_config
from dina_reward.planning.activations import Kept, activations_of, counted_flops


Inputs: TypeAlias = Callable[[int], tuple[Tensor, Tensor, Conditioning]]


@dataclass(frozen=True)
class RunSizes:
    """What the parts of a run are, apart from how they are spread over devices.

    Args:
        card: generator and reward at the run's size and length of prompts.
        reward_flops: one score, with prompts of the reward's own length.
        text_encoders, vae: parameters.
        block_weights: weights of the linear layers of the blocks, which 4-bit storage applies to.
        largest_block: parameters of the largest block, the unit that FSDP2 gathers.
        outside_blocks: parameters outside the blocks, which FSDP2 keeps gathered.
        policy_lora: parameters of the policy's LoRA.
        denoiser_kept: what one denoiser call with gradient keeps, per row.
        reward_kept: what a score keeps whose gradient is asked for, per row and level.
        decode_bytes: of decoding one latent: the input, the output and one more map of the largest layer.
        latent_elements: of one latent.
        embed_elements: of one encoded prompt.
        denoiser_config: of the generator's denoiser.
    """

    card: BackboneCard
    reward_flops: int
    text_encoders: int
    vae: int
    block_weights: int
    largest_block: int
    outside_blocks: int
    policy_lora: int
    denoiser_kept: Kept
    reward_kept: Kept
    decode_bytes: int
    latent_elements: int
    embed_elements: int
    denoiser_config: Mapping[str, Any]

    @property
    def denoiser(self) -> int:
        """Parameters of the generator's denoiser."""
        return self.card.denoiser_parameters

    @property
    def reward_trained(self) -> int:
        """Parameters of the reward's LoRA and head."""
        return self.card.lora_parameters + self.card.head_parameters


def sizes_of(structure: ModelStructure, config: AlignmentConfig, dtype: torch.dtype) -> RunSizes:
    """Counts the parts of an alignment run; no weight is allocated.

    Args:
        structure: of the generator.
        config: of the trainer: image size, LoRA, length of prompts.
        dtype: of the frozen weights.

    Raises:
        ValueError: a size that the model does not take, or LoRA targets that it does not have.
    """
    family, pipeline = structure.family, meta_pipeline(structure)
    size: dict[str, Any] = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    own = replace(structure, text_tokens=prompt_tokens(family, pipeline, structure, config.max_sequence_length))
    card = card_of(own, **size)
    denoiser = getattr(pipeline, family.denoiser_attribute)
    names = set(block_linears(denoiser))
    blocks = _blocks(denoiser)
    counts = {
        "block_weights": sum(m.weight.numel() for name, m in denoiser.named_modules() if name in names),
        "largest_block": max(map(_parameters, blocks), default=0),
        "outside_blocks": _parameters(denoiser) - sum(map(_parameters, blocks)),
        "text_encoders": text_encoder_parameters(structure),
        "vae": _parameters(pipeline.vae),
    }
    inputs = partial(_inputs, card, dtype)
    decode = _decode_bytes(pipeline, family, inputs(1)[0])
    compute = torch.bfloat16 if config.bf16 else dtype
    reward_flops, reward_kept = _reward(
        own, partial(_inputs, replace(card, text_tokens=structure.text_tokens), dtype), compute
    )
    lora, kept = _policy(_in_dtype(denoiser, dtype), family, config, inputs, compute)
    return RunSizes(
        card=card,
        reward_flops=reward_flops,
        policy_lora=lora,
        denoiser_kept=kept,
        reward_kept=reward_kept,
        decode_bytes=decode,
        latent_elements=inputs(1)[0].numel(),
        embed_elements=card.text_tokens * card.text_width + (card.pooled_text_width or 0),
        denoiser_config=dict(denoiser.config),
        **counts,
    )


def prompt_tokens(family: ModelFamily, pipeline: Any, structure: ModelStructure, max_length: int | None) -> int:
    """Tokens of an encoded prompt of the policy; for models whose prompts vary in length, the most there can be."""
    if max_length is None:
        return structure.text_tokens
    return family.embeds_length(pipeline, max_length) or min(structure.text_tokens, max_length)


def text_encoder_parameters(structure: ModelStructure) -> int:
    """Parameters of all text encoders of a model, counted on the meta device; 0 where none are known."""
    import transformers

    total = 0
    for encoder in structure.text_encoders:
        model_class = getattr(transformers, encoder["class"])
        with torch.device("meta"):
            total += _parameters(model_class(model_class.config_class(**encoder["config"])))
    return total


def _policy(
    denoiser: Any,
    family: ModelFamily,
    config: AlignmentConfig,
    inputs: Inputs,
    compute: torch.dtype,
) -> tuple[int, Kept]:
    """Parameters of the policy's LoRA, and what a call with gradient keeps."""
    trained = 0
    if config.train_full_model:
        denoiser.requires_grad_(True)
    else:
        targets = list(config.lora_target_modules or family.policy_lora_targets)
        exclude = family.unread_layers(denoiser.config)
        with torch.device("meta"):
            denoiser.add_adapter(LoraConfig(r=config.lora_rank, target_modules=targets, exclude_modules=exclude))
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                trained += parameter.numel()

    def run(rows: int) -> Tensor:
        latents, timestep, conditioning = inputs(rows)
        return family.predict_velocity(denoiser, latents, timestep, conditioning, guidance_scale=1.0)

    return trained, activations_of(denoiser, run, compute)


def _reward(structure: ModelStructure, inputs: Inputs, compute: torch.dtype) -> tuple[int, Kept]:
    """FLOPs of one score, and what it keeps for the gradient of the latents."""
    family, pipeline = structure.family, meta_pipeline(structure)
    denoiser = _in_dtype(getattr(pipeline, family.denoiser_attribute), inputs(1)[0].dtype)
    config = default_reward_config(pipeline, backbone_config=dict(denoiser.config))
    with torch.device("meta"):
        backbone = family.build_backbone(
            denoiser, num_layers=config.num_layers, visual_taps=config.visual_taps, text_taps=config.text_taps or ()
        )
        model = LatentRewardModel(config, family, backbone, default_lora_config(config)).requires_grad_(False)

    def run(rows: int) -> Tensor:
        latents, timestep, conditioning = inputs(rows)
        return model(latents.float().requires_grad_(), timestep, conditioning)

    with warnings.catch_warnings():
        # The head's norms have float32 weights.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        return counted_flops(partial(run, 1), compute), activations_of(model, run, compute)


def _in_dtype(denoiser: nn.Module, dtype: torch.dtype) -> Any:
    """Casts every weight; diffusers' own `to` notes that it does."""
    return nn.Module.to(denoiser, dtype)


def _inputs(card: BackboneCard, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
    with torch.device("meta"):
        pooled = None if card.pooled_text_width is None else torch.empty(rows, card.pooled_text_width, dtype=dtype)
        conditioning = Conditioning(torch.empty(rows, card.text_tokens, card.text_width, dtype=dtype), pooled)
        return torch.empty(rows, *card.latent_shape, dtype=dtype), torch.empty(rows), conditioning


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def _decode_bytes(pipeline: Any, family: ModelFamily, latents: Tensor) -> int:
    largest = 0

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*args, output) if isinstance(tensor, Tensor)]
        largest = max([largest, *(tensor.numel() for tensor in tensors)])

    hooks = [module.register_forward_hook(note) for module in pipeline.vae.modules()]
    with torch.no_grad():
        family.decode_latents(pipeline, latents.float())
    for hook in hooks:
        hook.remove()
    return 3 * largest * latents.element_size()


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
