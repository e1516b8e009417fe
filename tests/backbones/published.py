"""What the card of the published reward's model says, counted in `test_cards.py` and written here for other tests."""

from __future__ import annotations

from dina_reward.backbones.cards import BackboneCard


SD35_MEDIUM_512 = BackboneCard(
    name="SD3.5-Medium",
    model_id="stabilityai/stable-diffusion-3.5-medium",
    family="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    denoiser_class="SD3Transformer2DModel",
    published_reward=True,
    total_blocks=24,
    num_layers=12,
    taps=(4, 8, 12),
    height=512,
    width=512,
    num_frames=1,
    latent_shape=(16, 64, 64),
    pipeline_latent_shape=(16, 64, 64),
    text_tokens=333,
    text_width=4096,
    pooled_text_width=2048,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    lora_rank=64,
    lora_layers=144,
    head_width=1536,
    denoiser_parameters=2_243_171_520,
    backbone_parameters=1_232_739_840,
    lora_parameters=28_311_552,
    head_parameters=139_296_003,
    standalone_bytes=3_135_909_900,
    shared_bytes=670_430_220,
    backbone_flops=1_372_311_920_640,
    reward_flops=1_456_188_607_488,
    step_flops=2_442_642_604_032,
    decode_flops=2_514_971_787_264,
)
