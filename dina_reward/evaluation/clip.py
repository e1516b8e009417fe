"""PickScore-type rewards: a CLIP model fine-tuned on preferences (arXiv 2305.01569).

score(image, prompt) = exp(logit_scale) * cos(text_embedding, image_embedding)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor


PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Models that are used with the processor of another repository."""


class ClipReward:
    """A CLIP model as a reward function of images, for evaluation and for the alignment trainers.

    Probabilities are those it was trained with: ``P(a > b) = softmax of the two scores``, so
    ``CallableScorer(reward, likelihood="bradley_terry")`` measures their calibration.

    Examples:
        >>> pickscore = ClipReward.from_pretrained("yuvalkirstain/PickScore_v1", device="cuda")
        >>> pickscore(images, ["a red circle on a white background"])

    Args:
        model: `transformers.CLIPModel`.
        processor: `transformers.CLIPProcessor`.
        name: in logs and tables.
    """

    def __init__(self, model: Any, processor: Any, name: str = "clip") -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.__name__ = name

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        processor_id: str | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> Self:
        """Loads a model and its processor.

        Args:
            model_id: directory or hub id of a `CLIPModel`.
            processor_id: of the `CLIPProcessor`; default the model's, for PickScore the one its authors use.
            torch_dtype: of the weights; scores are float32 in any case.
            device: where the model runs.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for both.

        Raises:
            ValueError: nothing there that can be loaded.
        """
        from transformers import CLIPModel, CLIPProcessor

        processor_id = processor_id or PROCESSORS.get(model_id, model_id)
        try:
            model: Any = CLIPModel.from_pretrained(model_id, dtype=torch_dtype, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load a CLIP model from {model_id!r}: {error}") from error
        try:
            processor = CLIPProcessor.from_pretrained(processor_id, **hub)
        except (OSError, ValueError, TypeError) as error:
            message = f"cannot load a CLIP processor from {processor_id!r}: {error}. Name another repository for it"
            raise ValueError(message) from error
        return cls(model.to(device), processor, name=model_id.rstrip("/").rpartition("/")[2])

    @property
    def device(self) -> torch.device:
        """Device the model runs on."""
        return self.model.device

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores images.

        Args:
            images: in [0, 1], shape ``(batch, 3, height, width)``, read as the 8-bit images that they would be saved as;
                or PIL images of any size.
            prompts: one per image, cut to the length the text encoder can read.

        Returns:
            `Tensor`: shape ``(batch,)``, float32, on the CPU.

        Raises:
            ValueError: images of another shape or range, or another number of prompts.
        """
        pictures = to_pictures(images) if isinstance(images, Tensor) else list(images)
        if len(pictures) != len(prompts):
            raise ValueError(f"got {len(pictures)} images and {len(prompts)} prompts; give one prompt per image")
        length = self.model.config.text_config.max_position_embeddings
        text = {"padding": True, "truncation": True, "max_length": length}
        inputs = self.processor(images=pictures, text=list(prompts), return_tensors="pt", **text).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model(**inputs)
        pairs = (outputs.image_embeds.float(), outputs.text_embeds.float())
        cosine = torch.cosine_similarity(*pairs, dim=-1)
        return (self.model.logit_scale.float().exp() * cosine).cpu()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """PIL images of a float tensor in [0, 1], shape ``(batch, 3, height, width)``.

    Raises:
        ValueError: another shape, or values outside of [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width)")
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"images lie in [{low:.4g}, {high:.4g}]; expected [0, 1]")
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
