"""Construction, loading, saving and placement of a reward; scoring is `LatentReward`'s."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dina_reward.backbones.attach import AttachedBackbone, BackboneSource, attach_backbone
from dina_reward.backbones.sharing import SharedBackboneError
from dina_reward.checkpoints.convert import read_checkpoint, resolve_checkpoint
from dina_reward.checkpoints.native import write_checkpoint
from dina_reward.checkpoints.parts import Checkpoint, CheckpointError, check_state
from dina_reward.checks.stored import check_same
from dina_reward.families import get_family
from dina_reward.modeling import LatentRewardConfig, LatentRewardModel, default_lora_config
from dina_reward.modeling.config import lora_facts
from dina_reward.modeling.prompt_encoding import PromptEncoder
from dina_reward.noise.draws import checked_seed


_NOT_OF_THE_WEIGHTS = {"backbone_model_id", "backbone_config", "scheduler_config"}
"""Where the backbone comes from; that it fits is checked when it is attached."""


class PretrainedReward:
    """A `LatentRewardModel` with its backbone, scheduler grid and text encoders, that can be loaded and saved."""

    def __init__(
        self,
        attached: AttachedBackbone,
        lora_config: LoraConfig,
        *,
        pipeline: Any | None = None,
        prompt_cache_size: int = 128,
    ) -> None:
        self.config = attached.config
        self.family = get_family(self.config.family)
        self.noise_process = attached.noise_process
        if attached.shared is not None and (lora_config.bias != "none" or lora_config.modules_to_save):
            raise SharedBackboneError(
                f"the reward's adapter has weights of the model itself (bias={lora_config.bias!r}, "
                f"modules_to_save={lora_config.modules_to_save}), which would overwrite the generator's; load it with "
                "share_backbone=False"
            )
        self.model = LatentRewardModel(self.config, self.family, attached.backbone, lora_config)
        self.prompt_encoder = PromptEncoder(
            self.family,
            pipeline,
            max_sequence_length=self.config.max_sequence_length,
            cache_size=prompt_cache_size,
        )
        self._shared = attached.shared
        self._warned: set[str] = set()
        self.__name__ = "latent_reward"

    def __repr__(self) -> str:
        config, placement = self.config, "with a backbone of its own"
        if self.shares_backbone:
            placement = "on its generator's tensors"
        if self.quantized:
            placement += " in 4 bits"
        parameter = next(self.model.backbone.get_base_model().parameters())
        return (
            f"{type(self).__name__}(family={config.family!r}, backbone={config.backbone_model_id!r}, "
            f"{config.num_layers} of {self.family.num_blocks(config.backbone_config)} blocks, read after "
            f"{', '.join(map(str, config.visual_taps))}; {placement}, {parameter.dtype} on {self.device}, "
            f"noise_level={config.noise_level}, {'training' if self.model.training else 'inference'})"
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        pipeline: Any | None = None,
        transformer: nn.Module | None = None,
        scheduler: Any | None = None,
        *,
        share_backbone: bool = False,
        backbone: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        load_in_4bit: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        prompt_cache_size: int = 128,
    ) -> Self:
        """Loads a reward for scoring.

        Args:
            path_or_id: directory or hub id of a native checkpoint or of one in the published reference layout; or
                ``"shapes"`` or ``"shapes-ddpm"``, which ship with the package.
            pipeline: diffusers pipeline of the reward's family; gives backbone, scheduler and text encoders.
            transformer: the denoiser alone, e.g. ``pipe.transformer``; wins over the pipeline's.
            scheduler: training scheduler (or its config) whose grid noise levels snap to; wins over all others.
            share_backbone: run on the generator's own tensors (extra memory: LoRA and head) instead of a copy with
                the LoRA merged into it. The generator itself is not wrapped, switched or re-flagged.
            backbone: model id or path to load the backbone from when neither pipeline nor transformer is given;
                default: the one the checkpoint names.
            torch_dtype: dtype the backbone computes in. LoRA, head and scores are float32 in any case.
            device: where to put the reward; in shared mode the generator's device.
            load_in_4bit: store the blocks' weights in 4 bits (NF4, arXiv 2305.14314), for a seventh of their float32 memory;
                the LoRA then stays apart from them, and scores differ a little.
            revision, token, cache_dir, local_files_only: options for the hub.
            prompt_cache_size: encoded prompts that are kept; ``0`` for none.

        Raises:
            CheckpointError: (a `ValueError`) the checkpoint is missing, damaged, or does not fit the backbone.
            SharedBackboneError: (a `ValueError`) sharing cannot be right for this generator.
            ValueError: a pipeline of another family or size.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        directory = resolve_checkpoint(path_or_id, revision=revision, **hub)  # type: ignore[arg-type]
        checkpoint = read_checkpoint(directory)
        source = BackboneSource(
            pipeline,
            transformer,
            scheduler,
            share_backbone,
            backbone,
            torch_dtype,
            device,
            load_in_4bit,
            directory,
            hub,
        )
        attached = attach_backbone(checkpoint.config, source)
        with torch.random.fork_rng():  # the initial weights are drawn, then replaced
            reward = cls(attached, checkpoint.lora_config, pipeline=pipeline, prompt_cache_size=prompt_cache_size)
        reward._load(checkpoint)
        return reward.eval()

    @classmethod
    def from_config(
        cls,
        config: LatentRewardConfig,
        pipeline: Any | None = None,
        transformer: nn.Module | None = None,
        scheduler: Any | None = None,
        *,
        lora_config: LoraConfig | None = None,
        share_backbone: bool = False,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        load_in_4bit: bool = False,
        seed: int = 0,
        prompt_cache_size: int = 128,
    ) -> Self:
        """New reward with a fresh LoRA and head, ready to train; never use it to score before it is trained.

        Args:
            config: what to build; ``backbone_config`` and ``scheduler_config`` are filled in from the backbone.
            lora_config: PEFT configuration; default `default_lora_config` (rank 64).
            seed: of the initial LoRA and head weights; the global random state is left as it was.

        Other arguments as for `from_pretrained`.
        """
        source = BackboneSource(
            pipeline,
            transformer,
            scheduler,
            share_backbone,
            torch_dtype=torch_dtype,
            device=device,
            load_in_4bit=load_in_4bit,
        )
        attached = attach_backbone(config, source)
        lora_config = lora_config or default_lora_config(attached.config)
        with torch.random.fork_rng():
            torch.manual_seed(checked_seed(seed))
            reward = cls(attached, lora_config, pipeline=pipeline, prompt_cache_size=prompt_cache_size)
        return reward.train()

    @property
    def device(self) -> torch.device:
        """Device scores are computed on."""
        return self.model.device

    @property
    def lora_config(self) -> LoraConfig:
        """PEFT configuration of the reward's LoRA."""
        return cast(LoraConfig, self.model.backbone.peft_config["default"])

    @property
    def shares_backbone(self) -> bool:
        """Whether the backbone's tensors are a generator's."""
        return self._shared is not None

    @property
    def quantized(self) -> bool:
        """Whether the backbone's weights are quantised, so that the LoRA cannot be merged into them."""
        return bool(getattr(self.model.backbone.get_base_model(), "is_loaded_in_4bit", False))

    @property
    def merged(self) -> bool:
        """Whether the LoRA is merged into the backbone."""
        return any(layer.merged for layer in self.model.backbone.modules() if isinstance(layer, BaseTunerLayer))

    def to(self, device: torch.device | str) -> Self:
        """Moves a reward with a backbone of its own.

        Raises:
            ValueError: the backbone is shared; move the generator instead.
        """
        if self._shared is not None:
            raise ValueError("this reward lives on its generator's tensors; move the generator instead")
        self.model.to(device)
        self.prompt_encoder.clear()
        return self

    def eval(self) -> Self:
        """Inference: no gradients on LoRA and head, LoRA merged where the backbone is the reward's own and not quantised."""
        self.model.eval().set_trainable(False)
        if self._shared is None and not self.quantized:
            self.merge_lora()
        return self

    def train(self) -> Self:
        """Training: LoRA apart from the backbone, gradients on LoRA and head."""
        self.unmerge_lora()
        self.model.train().set_trainable(True)
        return self

    def compile(self, **kwargs: Any) -> Self:
        """Compiles backbone and head with `torch.compile`; keyword arguments go there."""
        self.model.backbone.compile(**kwargs)
        self.model.head.compile(**kwargs)
        return self

    def merge_lora(self) -> None:
        """Folds the LoRA into the backbone's weights (faster scoring).

        Raises:
            ValueError: the backbone is shared, so that merging would alter the generator; or quantised, so that it would
                round the LoRA away.
        """
        if self._shared is not None:
            raise ValueError("a shared backbone cannot hold the LoRA: merging would alter the generator")
        if self.quantized:
            raise ValueError(
                "a LoRA cannot be merged into 4-bit weights without rounding it; load the reward without load_in_4bit"
            )
        if not self.merged:
            self.model.backbone.merge_adapter()

    def unmerge_lora(self) -> None:
        """Takes the LoRA out of the backbone's weights again."""
        if self.merged:
            self.model.backbone.unmerge_adapter()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the native checkpoint (see `dina_reward.checkpoints`); it is never half written."""
        write_checkpoint(directory, self.checkpoint())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload latent reward",
    ) -> str:
        """Uploads the native checkpoint to a hub repository, which is created if need be.

        Returns:
            Address of the commit.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as directory:
            self.save_pretrained(os.path.join(directory, "reward"))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=os.path.join(directory, "reward"),
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit.commit_url)

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Loads adapter and head of a native checkpoint of this same reward into it, strictly.

        Raises:
            CheckpointError: (a `ValueError`) it is of another configuration; or keys, shapes or files do not fit.
        """
        merged = self.merged
        checkpoint = read_checkpoint(directory)
        self.check_same(checkpoint, str(directory))
        self.unmerge_lora()
        self._load(checkpoint)
        if merged:
            self.merge_lora()

    def check_same(self, checkpoint: Checkpoint, where: str) -> None:
        """Refuses weights of a reward with another configuration or LoRA, which names and shapes may not show.

        Raises:
            CheckpointError: (a `ValueError`) naming what differs.
        """
        check_same(
            {**checkpoint.config.to_dict(), **lora_facts(checkpoint.lora_config)},
            {**self.config.to_dict(), **lora_facts(self.lora_config)},
            f"{where} is of another reward",
            "Load it with LatentReward.from_pretrained, or build this one with the same configuration",
            may_differ=_NOT_OF_THE_WEIGHTS,
            error=CheckpointError,
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        backbone, head = self.model.backbone, self.model.head
        check_state(checkpoint.adapter, get_peft_model_state_dict(backbone), "LoRA adapter")
        check_state(checkpoint.head, head.state_dict(), "head")
        set_peft_model_state_dict(backbone, checkpoint.adapter)
        head.load_state_dict(checkpoint.head)

    def checkpoint(self) -> Checkpoint:
        """What `save_pretrained` writes; the tensors are the live ones."""
        backbone = self.model.backbone
        return Checkpoint(
            config=self.config,
            lora_config=self.lora_config,
            adapter=get_peft_model_state_dict(backbone),
            head=dict(self.model.head.state_dict()),
        )
