"""Everything that turns a backbone into a reward apart from weights, and the defaults for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dina_reward.checks.values import check_fields
from dina_reward.families import family_of, get_family
from dina_reward.likelihood import LikelihoodName, PreferenceModel, preference_model
from dina_reward.modeling.heads.config import RewardHeadConfig


if TYPE_CHECKING:
    from peft import LoraConfig


_LONGEST_PROMPT = 32_768
_LORA_FACTS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
)


@dataclass(frozen=True)
class LatentRewardConfig:
    """Everything that turns a backbone into a reward, apart from weights and the LoRA configuration.

    Args:
        family: name of the model family; `default_reward_config` fills it in.
        num_layers: blocks of the backbone that run.
        visual_taps: 1-based numbers of the blocks after which image tokens are read.
        text_taps: the same for text tokens; by default ``visual_taps``, or none if the head reads no text.
        backbone_model_id: hub id or path of the diffusers model the reward was trained on. A path that starts with
            ``.`` is relative to the checkpoint's directory.
        backbone_config: configuration of that model's denoiser, compared when a backbone is attached.
        scheduler_config: configuration of the scheduler whose grid the noise levels snap to.
        head: shape of the head.
        likelihood: from scores to preferences: ``"thurstone"``, or ``"bradley_terry"``, which ignores the noise level.
        variance_scale, variance_offset: ``k`` and ``c`` of the Thurstone variance ``k sigma^2 + c``.
        noise_level: level, or levels of an ensemble, used when a call names none.
        spread_scale: standard error of a score over its spread, for conservative scoring; see `calibrate_spread`.
        score_shift, score_scale: normalised score = ``(raw + score_shift) / score_scale``.
        max_sequence_length: token limit that prompts were encoded with; ``None`` takes the pipeline's default.
    """

    family: str
    num_layers: int
    visual_taps: tuple[int, ...]
    text_taps: tuple[int, ...] | None = None
    backbone_model_id: str | None = None
    backbone_config: dict[str, Any] = field(default_factory=dict)
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    head: RewardHeadConfig = field(default_factory=RewardHeadConfig)
    likelihood: LikelihoodName = "thurstone"
    variance_scale: float = 2.0
    variance_offset: float = 0.05
    noise_level: float | tuple[float, ...] = 0.4
    score_shift: float = 10.0
    score_scale: float = 10.0
    max_sequence_length: int | None = None
    spread_scale: float = 1.0

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("visual_taps", "text_taps", "noise_level"):
            if isinstance(getattr(self, name), list):
                set_field(self, name, tuple(getattr(self, name)))
        if isinstance(self.head, Mapping):
            set_field(self, "head", _dataclass_from(RewardHeadConfig, self.head, "head configuration"))
        if not isinstance(self.head, RewardHeadConfig):
            raise ValueError(f"head must be a RewardHeadConfig or a dictionary of its fields, got {self.head!r}")
        if self.noise_level == ():
            raise ValueError("noise_level is empty; name at least one level, e.g. 0.4")
        if self.text_taps is None:
            set_field(self, "text_taps", self.visual_taps if self.head.use_text_features else ())
        check_fields(self)
        for name in ("visual_taps", "text_taps"):
            taps = getattr(self, name)
            if list(taps) != sorted(set(taps)) or any(not 1 <= tap <= self.num_layers for tap in taps):
                raise ValueError(
                    f"{name} must be increasing block numbers between 1 and num_layers={self.num_layers}, got {taps}"
                )
        if not self.visual_taps:
            raise ValueError("visual_taps is empty; name at least one block to read")
        if self.head.use_text_features and not self.text_taps:
            raise ValueError("text_taps is empty but head.use_text_features is true")
        check_fields(self, num_layers=(1, 10_000), noise_level=(0, 1), max_sequence_length=(1, _LONGEST_PROMPT))
        if self.spread_scale < 0:
            raise ValueError(f"spread_scale must not be negative, got {self.spread_scale}")
        if self.variance_scale < 0 or self.variance_offset <= 0 or self.score_scale <= 0:
            raise ValueError(
                "variance_scale must be >= 0, variance_offset and score_scale > 0, got "
                f"{self.variance_scale}, {self.variance_offset}, {self.score_scale}"
            )
        self.preference_model()

    def preference_model(self) -> PreferenceModel:
        """From scores to the probability of a preference."""
        return preference_model(self.likelihood, self.variance_scale, self.variance_offset)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentRewardConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing keys.
        """
        return _dataclass_from(cls, values, "reward configuration")


def default_reward_config(model: Any, **settings: Any) -> LatentRewardConfig:
    """Configuration of a new reward for a pipeline or denoiser: the published one for its size, or the package's rule.

    Args:
        model: a diffusers pipeline or its denoiser.
        settings: fields of `LatentRewardConfig` that replace the defaults.

    Raises:
        ValueError: the model belongs to no supported family.
    """
    family = family_of(model)
    denoiser_config = getattr(model, family.denoiser_attribute, model).config
    defaults = family.reward_defaults(denoiser_config)
    values: dict[str, Any] = {
        "family": family.name,
        "num_layers": defaults.num_layers,
        "visual_taps": defaults.taps,
        "head": RewardHeadConfig(width=defaults.head_width),
    }
    return LatentRewardConfig(**{**values, **settings})


def default_lora_config(
    config: LatentRewardConfig, *, rank: int | None = None, alpha: int | None = None
) -> LoraConfig:
    """The published LoRA: gaussian initialisation, ``alpha = 2 rank``, every attention projection.

    The rank is the published one of the model, where ``config.backbone_config`` says which it is, and else 64.

    Where the family's blocks transform text and the last text tap lies before the last block (or there is none), that
    block's text projections are left alone.
    """
    from dina_reward.modeling.lora import new_lora_config

    family = get_family(config.family)
    targets = family.reward_lora_targets
    if rank is None:
        rank = family.reward_defaults(config.backbone_config).lora_rank if config.backbone_config else 64
    transforms_text = any(target.endswith("to_add_out") for target in targets)
    unread = transforms_text and config.num_layers > max(config.text_taps or (0,))
    last = rf".*\.{config.num_layers - 1}\..*\.(add_[qkv]_proj|to_add_out)"
    return new_lora_config(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=list(targets),
        exclude_modules=last if unread else None,
    )


def lora_facts(lora_config: LoraConfig) -> dict[str, Any]:
    """What of a LoRA's configuration decides what its weights mean, in a form that JSON can hold."""
    values = lora_config.to_dict()
    return {
        f"LoRA {name}": sorted(values[name]) if isinstance(values[name], set) else values[name] for name in _LORA_FACTS
    }


def _dataclass_from(cls: type, values: Mapping[str, Any], what: str) -> Any:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown keys in the {what}: {unknown}; known keys are {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"incomplete {what}: {error}") from None
