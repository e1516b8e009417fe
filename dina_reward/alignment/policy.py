"""The generator as a policy: its denoiser with a LoRA adapter, or trained in full, and the reference it started from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.policy_weights import LORA_WEIGHTS_NAME as LORA_WEIGHTS_NAME
from dina_reward.alignment.policy_weights import load_full, load_lora, save_full, save_lora
from dina_reward.backbones.quantization import is_quantized, quantize_blocks
from dina_reward.backbones.wrappers import check_lora_targets, check_separate_projections
from dina_reward.training.sharding import ExactTimesteps, exchange, local, slice_like, trainable_parameters


ADAPTER_NAME = "policy"


class Policy(Generator):
    """A diffusers pipeline whose denoiser is trained: a LoRA in float32 over frozen weights, or all of its weights.

    Trained tensors are always float32, the master copy of mixed precision; autocast computes in bfloat16 if asked. The
    denoiser may be wrapped by DDP or sharded by FSDP2 afterwards (DeepSpeed's ZeRO-2 is tested with rewards alone): what is
    saved are whole tensors, and snapshots hold each rank's own slices. Every prediction is counted in `calls`, a
    `CallCounter`.

    Examples:
        >>> policy = Policy(pipe, rank=32, alpha=64)
        >>> predict = policy.bind(policy.encode(["a cat"], device), policy.encode_negative(device))
        >>> velocity = predict(latents, timestep)  # (batch, ...), float32

    Args:
        pipeline: a text-to-image pipeline of a supported family, flow-matching or DDPM.
        rank, alpha (`int`): of the LoRA; not read when the full model is trained.
        target_modules: suffixes of the layers to adapt, each of which must match; those of the family by default.
        guidance_scale (`float`): classifier-free guidance runs above 1, in sampling and in training alike.
        max_sequence_length (`int`, *optional*): length that prompts are encoded to.
        train_full_model (`bool`): train every weight of the denoiser instead of a LoRA.
        keep_reference (`bool`): with the full model, keep a frozen copy of the initial weights for `reference`.
        load_in_4bit (`bool`): store the frozen weights of the blocks in 4 bits under the LoRA (QLoRA, arXiv 2305.14314);
            a pipeline that diffusers has loaded quantised is used as it is.

    Raises:
        ValueError: a pipeline that samples in a way its family does not support; the denoiser has an adapter already or
            fused projections; a target matches no layer; it is trained in full but not float32, or quantised.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        rank: int,
        alpha: int,
        target_modules: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
        train_full_model: bool = False,
        keep_reference: bool = False,
        load_in_4bit: bool = False,
    ) -> None:
        super().__init__(pipeline, guidance_scale=guidance_scale, max_sequence_length=max_sequence_length)
        self.train_full_model = train_full_model
        self._class_name = type(self.denoiser).__name__
        self._initial: list[Tensor] | None = None
        self._timesteps: ExactTimesteps | None = None
        _refuse_adapters(self.denoiser)
        check_separate_projections(self.denoiser)
        config: Any = self.denoiser.config
        unread = self.family.unread_layers(config)
        if train_full_model:
            _train_all(self.denoiser, load_in_4bit, unread)
            if keep_reference:
                self._initial = self.snapshot()
        else:
            self.denoiser.requires_grad_(False)
            if load_in_4bit:
                quantize_blocks(self.denoiser)
            if target_modules is not None:
                check_lora_targets(self.denoiser, target_modules)
            _add_lora(self.denoiser, rank, alpha, target_modules or self.family.policy_lora_targets, unread)
        # Sampling and training must be the same function of the weights, so dropout stays off in both.
        self.denoiser.eval()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The denoiser as it was before training, inside the context; on leaving, the trained one with the same flags.

        With a LoRA the adapter is off. With the full model the initial weights are put in its place, a copy as large as
        the model that `keep_reference` asks for.

        Raises:
            ValueError: the full model is trained and no copy of the initial weights was kept.
        """
        if not self.train_full_model:
            self.denoiser.disable_adapters()  # type: ignore[operator]
            try:
                yield
            finally:
                self.denoiser.enable_adapters()  # type: ignore[operator]
            return
        if self._initial is None:
            raise ValueError(
                "the full model is trained and no copy of its initial weights was kept, so there is no reference for a KL "
                "penalty: set beta to 0, train a LoRA, or pass keep_reference=True (one more copy of the weights)"
            )
        parameters = self.trainable_parameters().values()
        if any(tensor.shape != local(p).shape for tensor, p in zip(self._initial, parameters, strict=True)):
            # Kept whole before the model was sharded.
            self._initial = [slice_like(whole, p) for whole, p in zip(self._initial, parameters, strict=True)]
        with self.use_weights(self._initial):
            yield

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """The denoiser with its LoRA added to the frozen weights, inside the context: calls cost what the base model costs.

        Predictions are those of the LoRA beside the weights up to rounding, in the weights' dtype. On leaving, the frozen
        weights are back bit for bit, from copies of the adapted layers that are kept meanwhile. What shares the weights,
        such as a latent reward on them, must not run inside.

        Raises:
            ValueError: there is no LoRA, or the weights are quantised or sharded.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from torch.distributed.fsdp import FSDPModule

        if self.train_full_model or is_quantized(self.denoiser) or isinstance(self.denoiser, FSDPModule):
            why = "trained in full" if self.train_full_model else "quantised or sharded"
            raise ValueError(
                f"the denoiser's weights are {why}, so no LoRA can be merged into them; see merge_for_rollout"
            )
        layers: list[Any] = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        frozen = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.merge(adapter_names=[ADAPTER_NAME])
            yield
        finally:
            with torch.no_grad():
                for layer, weight, before in zip(layers, weights, frozen, strict=True):
                    layer.unmerge()
                    weight.data.copy_(before)  # what was subtracted again has been rounded

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name, in a fixed order; under FSDP2 the sharded ones."""
        return trainable_parameters(self.denoiser)

    def snapshot(self) -> list[Tensor]:
        """Copies of the trained tensors, e.g. for an old policy; under FSDP2 this rank's slices.

        Element-wise arithmetic between snapshots (a moving average of policies) is right on every rank.
        """
        return [local(parameter).clone() for parameter in self.trainable_parameters().values()]

    @contextlib.contextmanager
    def use_weights(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Runs the denoiser with the weights of a `snapshot`; on leaving, the trained ones are back bit for bit.

        No third copy is made: inside the context ``tensors`` hold the trained weights. Graphs recorded before the context
        stay valid for a backward pass after it; a graph recorded inside has to be used inside.

        Raises:
            ValueError: number, shapes or dtypes are not those of the trained tensors.
        """
        parameters = self.trainable_parameters()
        given = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        expected = [(tuple(local(p).shape), p.dtype) for p in parameters.values()]
        if given != expected:
            raise ValueError(
                f"these {len(given)} tensors are no snapshot of the {len(expected)} trained ones; their number, shapes "
                "and dtypes must be what snapshot() returns"
            )
        exchange(parameters.values(), tensors)
        try:
            yield
        finally:
            exchange(self.trainable_parameters().values(), tensors)

    def save_weights(self, directory: str, write: bool | None = None) -> None:
        """Writes what is trained: the LoRA (`save_lora`), or the denoiser into a sub-folder named as in the pipeline.

        The sub-folder (``transformer`` or ``unet``) is read by the diffusers class's ``from_pretrained``. Under FSDP2 all
        ranks have to call this together. What is written is complete or absent.

        Args:
            directory: created if it does not exist; other files in it are left alone.
            write: whether this process writes; rank 0 by default.
        """
        if not self.train_full_model:
            self.save_lora(directory, write)
            return
        self.trainable_parameters()
        save_full(self.denoiser, directory, self.family.denoiser_attribute, self._class_name, write)

    def load_weights(self, directory: str) -> None:
        """Restores what `save_weights` wrote, on every rank; the counterpart for sharded models as well.

        Raises:
            ValueError: files are missing, or do not hold exactly the trained tensors.
        """
        if not self.train_full_model:
            self.load_lora(directory)
            return
        self.trainable_parameters()
        load_full(self.denoiser, directory, self.family.denoiser_attribute)

    def save_lora(self, directory: str, write: bool | None = None) -> None:
        """Writes the adapter in the format that ``pipeline.load_lora_weights(directory)`` reads; never a partial file.

        Raises:
            ValueError: the full model is trained.
        """
        self._require_lora("save_weights")
        self.trainable_parameters()
        save_lora(self.pipeline, self.denoiser, directory, self.family.denoiser_attribute, ADAPTER_NAME, write)

    def load_lora(self, directory: str) -> None:
        """Restores the adapter from a directory that `save_lora` wrote.

        Raises:
            ValueError: the full model is trained, the file is missing, or it does not hold exactly the adapter's tensors.
        """
        self._require_lora("load_weights")
        self.trainable_parameters()
        load_lora(self.denoiser, directory, self.family.denoiser_attribute, ADAPTER_NAME)

    def _require_lora(self, instead: str) -> None:
        if self.train_full_model:
            raise ValueError(f"the full model is trained, so there is no LoRA to save or load; use {instead}")

    def _before_call(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        if self._timesteps is None and isinstance(self.denoiser, FSDPModule):
            self._timesteps = ExactTimesteps(self.denoiser)


def _refuse_adapters(denoiser: nn.Module) -> None:
    existing = sorted(getattr(denoiser, "peft_config", {}))
    if existing:
        raise ValueError(
            f"the denoiser already has the adapter(s) {', '.join(existing)}; the reference of the KL penalty is the model "
            "without any. Unload them, or fuse them before training (`pipeline.fuse_lora()`, "
            "`pipeline.unload_lora_weights()`) and load a latent reward with share_backbone=False: fused weights are not "
            "those it was trained on"
        )


def _train_all(denoiser: nn.Module, load_in_4bit: bool, unread: str | None) -> None:
    if load_in_4bit or is_quantized(denoiser):
        raise ValueError("quantised weights cannot be trained in full; train a LoRA on them or load them unquantised")
    dtypes = {parameter.dtype for parameter in denoiser.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(
            f"full fine-tuning needs a float32 denoiser, this one has {', '.join(sorted(map(str, dtypes)))}: updates of "
            "1e-5 are lost in 16 bits. Load the pipeline with torch_dtype=torch.float32; bf16=True (autocast) computes in "
            "bfloat16 all the same"
        )
    for name, parameter in denoiser.named_parameters():
        # Without this, data parallel training would wait for gradients that never come.
        parameter.requires_grad_(unread is None or re.fullmatch(unread, name.rpartition(".")[0]) is None)


def _add_lora(denoiser: nn.Module, rank: int, alpha: int, target_modules: Sequence[str], unread: str | None) -> None:
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        exclude_modules=unread,
        init_lora_weights="gaussian",
    )
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)  # type: ignore[operator]
    cast_training_params(denoiser, dtype=torch.float32)
