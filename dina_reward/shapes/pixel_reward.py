"""A pixel reward for comparison with the latent one: a small residual network on decoded images, steered by the caption.

It has as many parameters as the latent reward reads and trains on the same pairs by the same likelihood.
`recipes/compare_pixel_reward.py` puts the two side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from dina_reward.checkpoints.atomic import atomic_directory
from dina_reward.families import family_of
from dina_reward.likelihood import PreferenceLoss, ThurstoneModel
from dina_reward.modeling.inputs import NonFiniteError
from dina_reward.modeling.prompt_encoding import PromptEncoder
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.preferences import PreferencePairs
from dina_reward.shapes.renderer import IMAGE_SIZE
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from dina_reward.training.ema import EMACallback


CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
NORM_GROUPS = 8
STEPS = 3000
"""Optimizer steps, as many as the first phase of the latent reward has, which got five more (9,900 steps in all)."""

FIXED_VARIANCE = 0.05
"""Variance of a score in training: that of the latent reward's likelihood at noise level 0."""


@dataclass(frozen=True)
class PixelRewardConfig:
    """Sizes of a `PixelNetwork`, and the variance of its likelihood.

    Args:
        text_channels: of the pipeline's prompt embeddings.
        image_size: height and width of the images, in pixels.
        widths: channels of each stage; each stage halves height and width.
        blocks: residual blocks of each stage after the first, beside the one that halves.
        text_size: of the vector that a caption becomes.
        variance_offset: Thurstone variance of a score.
    """

    text_channels: int
    image_size: int = IMAGE_SIZE
    widths: tuple[int, ...] = (32, 64, 152)
    blocks: tuple[int, ...] = (3, 3)
    text_size: int = 128
    variance_offset: float = FIXED_VARIANCE

    def __post_init__(self) -> None:
        for name in ("widths", "blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if len(self.blocks) != len(self.widths) - 1 or any(width % NORM_GROUPS for width in self.widths):
            raise ValueError(
                f"widths are {self.widths} and blocks {self.blocks}; expected multiples of {NORM_GROUPS}, and a number of "
                "blocks for every width but the first"
            )


class PixelNetwork(nn.Module):
    """A residual network whose blocks are scaled and shifted by the caption (FiLM, arXiv 1709.07871).

    A caption becomes one vector, the normalised mean over its tokens of what a small network makes of each. The last feature
    maps are pooled (means and maxima) and read under the caption, too.

    Args:
        config: the sizes.
    """

    def __init__(self, config: PixelRewardConfig) -> None:
        super().__init__()
        text, last = config.text_size, config.widths[-1]
        self.words = nn.Sequential(
            nn.LayerNorm(config.text_channels), nn.Linear(config.text_channels, text), nn.SiLU(), nn.Linear(text, text)
        )
        self.caption_norm = nn.LayerNorm(text)
        self.conv_in = nn.Conv2d(3, config.widths[0], 5, stride=2, padding=2)
        self.blocks = nn.ModuleList()
        for inside, outside, count in zip(config.widths[:-1], config.widths[1:], config.blocks, strict=True):
            self.blocks += [
                _block(inside, outside, text, down=True),
                *(_block(outside, outside, text) for _ in range(count)),
            ]
        self.norm = nn.GroupNorm(NORM_GROUPS, last)
        self.pooled, self.film = nn.Linear(2 * last, 2 * text), nn.Linear(text, 4 * text)
        self.score = nn.Sequential(
            nn.LayerNorm(2 * text), nn.Linear(2 * text, 2 * text), nn.SiLU(), nn.Linear(2 * text, 1)
        )

    def forward(self, images: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Scores, shape ``(batch,)``.

        Args:
            images (`Tensor`): in [0, 1], shape ``(batch, 3, height, width)``.
            prompt_embeds (`Tensor`): shape ``(batch, length, text_channels)``.
        """
        caption = self.caption_norm(self.words(prompt_embeds).mean(dim=1))
        hidden = self.conv_in(2 * images - 1)
        for block in self.blocks:
            hidden = block(hidden, caption)
        hidden = F.silu(self.norm(hidden))
        hidden = self.pooled(torch.cat([hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3))], dim=1))
        scale, shift = self.film(caption).chunk(2, dim=1)
        return self.score(F.silu(hidden * (1 + scale) + shift)).squeeze(1)


def _block(inside: int, outside: int, text: int, down: bool = False) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=inside,
        out_channels=outside,
        temb_channels=text,
        groups=NORM_GROUPS,
        time_embedding_norm="scale_shift",
        down=down,
    )


class PixelReward:
    """Scores decoded images for their captions; a reward function of the alignment trainers, which decode for it.

    Args:
        model: the network.
        config: its sizes and the variance of its likelihood.
        pipeline: its text encoders read the captions.
    """

    def __init__(self, model: PixelNetwork, config: PixelRewardConfig, pipeline: Any) -> None:
        self.model, self.config = model.eval(), config
        self.prompt_encoder = PromptEncoder(family_of(pipeline), pipeline, max_sequence_length=MAX_PROMPT_TOKENS)

    @classmethod
    def new(cls, pipeline: Any, seed: int = 0, **sizes: Any) -> PixelReward:
        """An untrained reward.

        Args:
            pipeline: its text encoders read the captions.
            seed: of the initial weights.
            sizes: fields of `PixelRewardConfig`.
        """
        family = family_of(pipeline)
        prompt = family.encode_prompts(pipeline, [""], max_sequence_length=MAX_PROMPT_TOKENS)
        config = PixelRewardConfig(text_channels=prompt.prompt_embeds.shape[-1], **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(PixelNetwork(config), config, pipeline)

    @classmethod
    def from_pretrained(cls, directory: str | Path, pipeline: Any) -> PixelReward:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: the directory holds no pixel reward.
        """
        path = Path(directory, CONFIG_NAME)
        if not path.is_file():
            raise ValueError(f"{directory} holds no {CONFIG_NAME}; expected a directory that save_pretrained wrote")
        config = PixelRewardConfig(**json.loads(path.read_text(encoding="utf-8")))
        model = PixelNetwork(config)
        model.load_state_dict(load_file(Path(directory, WEIGHTS_NAME)))
        return cls(model, config, pipeline)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``; the directory appears whole or not at all."""
        with atomic_directory(directory) as staging:
            (staging / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
            tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})

    @property
    def preference_model(self) -> ThurstoneModel:
        """Likelihood of a preference: Thurstone of fixed variance."""
        return ThurstoneModel(variance_scale=0.0, variance_offset=self.config.variance_offset)

    @property
    def num_parameters(self) -> int:
        """Parameters, all of which are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def prompt_embeds(self, prompts: Sequence[str]) -> Tensor:
        """Encoded captions, shape ``(len(prompts), length, text_channels)``; each different one is encoded once."""
        conditioning, index = self.prompt_encoder(prompts, self.model.norm.weight.device)
        return conditioning.prompt_embeds[index].float()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, shape ``(batch,)``, float32; with a graph to the images unless gradients are off.

        Args:
            images (`Tensor`): in [0, 1], shape ``(batch, 3, height, width)``.
            prompts: one per image.

        Raises:
            ValueError: images of another shape, or another number of prompts.
            NonFiniteError: (a `ValueError`) a score is NaN or infinite.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or len(prompts) != len(images):
            raise ValueError(
                f"images have shape {tuple(images.shape)} for {len(prompts)} prompts; expected (batch, 3, {size}, {size}) "
                "and one prompt for each image"
            )
        device = self.model.norm.weight.device
        scores = self.model(images.to(device, torch.float32), self.prompt_embeds(prompts))
        if not bool(scores.isfinite().all()):
            raise NonFiniteError(
                "the pixel reward gave scores that are NaN or infinite; do the images hold such values?"
            )
        return scores


class _PairLoss(nn.Module):
    """Loss of a batch of pairs, as the module that `transformers.Trainer` trains."""

    def __init__(self, reward: PixelReward) -> None:
        super().__init__()
        self.model, self.loss = reward.model, PreferenceLoss(thurstone=reward.preference_model)

    def forward(self, images: Tensor, prompt_embeds: Tensor, p_chosen: Tensor) -> dict[str, Tensor]:
        chosen, rejected = self.model(images, prompt_embeds.repeat(2, 1, 1)).chunk(2)
        return {"loss": self.loss(chosen, rejected, torch.zeros_like(chosen), p_chosen)}


class _PixelRewardTrainer(AtomicCheckpointMixin, Trainer):
    """`transformers.Trainer` whose checkpoints are whole and hold the averages of the weights."""


class _Collator:
    """Row numbers to a batch: images, chosen ones first, captions and labels.

    Args:
        reward: encodes the captions.
        pairs: the pairs.
        images: decoded pool of the pairs.
    """

    def __init__(self, reward: PixelReward, pairs: PreferencePairs, images: Tensor) -> None:
        self.reward, self.pairs, self.images = reward, pairs, images

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        records = [self.pairs[row] for row in rows]
        pool_rows = torch.cat([self.pairs.chosen[rows], self.pairs.rejected[rows]])
        return {
            "images": self.images[pool_rows].float(),
            "prompt_embeds": self.reward.prompt_embeds([record["prompt"] for record in records]),
            "p_chosen": torch.tensor([record["p_chosen"] for record in records]),
        }


def train_pixel_reward(
    pipeline: Any,
    pairs: PreferencePairs,
    output: str | Path,
    *,
    steps: int = STEPS,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.995,
    seed: int = 0,
    **sizes: Any,
) -> PixelReward:
    """Trains a pixel reward with the optimizer and the budget of the latent one, see `train_reward`.

    A killed run resumes, a finished one is loaded.

    Args:
        pipeline: decodes the latents, once, and reads the captions.
        pairs: training preferences.
        output: directory of checkpoints.
        steps, batch_size, learning_rate, ema_decay, seed: of the optimizer.
        sizes: fields of `PixelRewardConfig`.

    Returns:
        `PixelReward`: with the averaged weights, ready to score.
    """
    output, averaged = Path(output), Path(output, "averaged")
    if averaged.is_dir():
        return PixelReward.from_pretrained(averaged, pipeline)
    reward = PixelReward.new(pipeline, seed, **sizes)
    images = torch.cat([decode_latents(pipeline.vae, part).half() for part in pairs.latents.split(1024)])
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    arguments = _training_arguments(output, settings)
    ema = EMACallback(reward.model, decay=ema_decay)
    trainer = _PixelRewardTrainer(
        _PairLoss(reward),
        arguments,
        data_collator=_Collator(reward, pairs, images),
        train_dataset=range(len(pairs)),
        callbacks=[ema],
    )
    reward.model.train()
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    with ema.average_parameters():
        reward.save_pretrained(averaged)
    return PixelReward.from_pretrained(averaged, pipeline)


def _training_arguments(output: Path, settings: Mapping[str, Any]) -> TrainingArguments:
    """Optimizer and schedule are those of `train_reward`."""
    steps = settings["max_steps"]
    return TrainingArguments(
        output_dir=str(output),
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=50,
        save_steps=max(steps // 4, 1),
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        **settings,
    )


@torch.no_grad()
def score_pairs(reward: PixelReward, pairs: PreferencePairs, pipeline: Any, batch_size: int = 128) -> Tensor:
    """Margins, chosen minus rejected score, shape ``(len(pairs),)``; latents are decoded by the pipeline."""
    margins = []
    for start in range(0, len(pairs), batch_size):
        rows = range(start, min(start + batch_size, len(pairs)))
        prompts = [pairs[row]["prompt"] for row in rows]
        latents = pairs.latents[torch.cat([pairs.chosen[list(rows)], pairs.rejected[list(rows)]])]
        chosen, rejected = reward(decode_latents(pipeline.vae, latents), prompts * 2).chunk(2)
        margins.append(chosen - rejected)
    return torch.cat(margins)


def calibrate_pixel_reward(reward: PixelReward, pairs: PreferencePairs, pipeline: Any) -> ThurstoneModel:
    """Fits the variance of the likelihood to pairs that the reward was not trained on; scores stay as they are.

    The variance of the least mean negative log-likelihood is chosen from a logarithmic grid of steps of 2 %.
    """
    margins = score_pairs(reward, pairs, pipeline)
    labels, zeros = torch.tensor([record["p_chosen"] for record in pairs]), torch.zeros_like(margins)

    def nll(variance: float) -> float:
        loss = PreferenceLoss("thurstone_nll", ThurstoneModel(0.0, variance))
        return float(loss(margins, zeros, zeros, labels))

    found = min((1.02**exponent for exponent in range(-350, 351)), key=nll)
    reward.config = replace(reward.config, variance_offset=float(f"{found:.3g}"))
    return reward.preference_model
