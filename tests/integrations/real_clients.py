"""The clients' own code with the reward on the embedded world; opt-in, since it needs the clients.

    pip install trl==0.23.1 && python tests/integrations/real_clients.py trl --epochs 10
    python tests/integrations/real_clients.py flow_grpo path/to/flow_grpo
    python tests/integrations/real_clients.py flow_factory path/to/Flow-Factory
    pip install aiohttp && python tests/integrations/real_clients.py verl_omni path/to/verl-omni

A path is that of a clone of github.com/yifan123/flow_grpo, X-GenGroup/Flow-Factory or verl-project/verl-omni.
Prints what it finds, and ends with an error where the client's contract has changed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dina_reward import LatentReward
from dina_reward.integrations import LatentOutput, as_trl_reward, decoded, multi_score_with, prompt_seeds
from dina_reward.shapes import Oracle, load_pipeline, sample_latents, sample_prompts, weights_dir


def run_trl(epochs: int) -> None:
    """`DDPOTrainer` of TRL <= 0.23 on the DDPM world: reward and oracle before and after."""
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState(cpu=True)  # TRL's wrapper logs before its trainer has made one

    class Pipeline(LatentOutput, DefaultDDPOStableDiffusionPipeline):
        pass

    pipeline = Pipeline(str(weights_dir("ddpm")))
    reward = LatentReward.from_pretrained("shapes-ddpm", pipeline=pipeline.sd_pipeline, share_backbone=True)
    prompts, shown = iter(sample_prompts(10**5, "train", seed=0)), []
    with tempfile.TemporaryDirectory() as directory:
        config = DDPOConfig(
            num_epochs=epochs,
            sample_num_steps=10,
            sample_batch_size=64,
            sample_num_batches_per_epoch=2,
            sample_guidance_scale=1.001,
            train_batch_size=32,
            train_gradient_accumulation_steps=1,
            train_learning_rate=3e-3,
            per_prompt_stat_tracking=False,
            mixed_precision="no",
            log_with=None,
            project_kwargs={"project_dir": directory, "automatic_checkpoint_naming": True},
        )
        hook = decoded(pipeline, lambda data, step, tracker: shown.append(data[0][0].shape))
        trainer = DDPOTrainer(config, as_trl_reward(reward), lambda: (next(prompts), {}), pipeline)
        images = [torch.zeros(1, pipeline.sd_pipeline.vae.config.latent_channels, 8, 8), ("a",), ({},), None, None]
        hook([images], 0, None)
        assert shown == [(1, 3, 32, 32)]
        judge("before", pipeline.sd_pipeline, reward)
        started = time.process_time()
        for epoch in range(epochs):
            trainer.step(epoch, epoch)
            if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
                judge(f"after {epoch + 1} epochs of 128", pipeline.sd_pipeline, reward)
        print(f"{epochs} epochs in {time.process_time() - started:.0f} s of a core")


@torch.no_grad()
def judge(when: str, pipe: Any, reward: LatentReward) -> None:
    """Mean reward and the oracle's opinion of samples for held-out prompts."""
    prompts = sample_prompts(144, "held_out", seed=1)
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "eta": 1.0, "output_type": "latent"}
    latents = pipe(prompts, generator=torch.manual_seed(1), **settings).images
    images = reward.family.decode_latents(pipe, latents)
    scores = Oracle()(images, prompts)
    mean = float(reward(latents, prompts, seed=0).mean())
    print(
        f"{when}: reward {mean:.2f}, oracle fit {float(scores.fit.mean()):.3f}, cleanness {scores.cleanness.mean():.3f}"
    )


def run_flow_grpo(checkout: Path) -> None:
    """flow_grpo's own `multi_score` with its JPEG reward beside ours, in its thread pool."""
    specification = importlib.util.spec_from_file_location("flow_grpo_rewards", checkout / "flow_grpo" / "rewards.py")
    assert specification is not None
    assert specification.loader is not None
    rewards = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(rewards)
    reward, prompts, latents, images = flow_samples()
    fn = multi_score_with(reward, {"latent_reward": 1.0, "jpeg_compressibility": 0.1}, rewards.multi_score, "cpu")
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=8) as executor:
        futures = [
            executor.submit(fn, images, prompts, [{}] * 16, only_strict=True, latents=latents) for _ in range(8)
        ]
        found = [future.result()[0] for future in futures]
    direct = reward(latents, prompts, seed=prompt_seeds(prompts))
    worst = max(float((torch.tensor(scores["latent_reward"]) - direct).abs().max()) for scores in found)
    seconds = time.perf_counter() - started
    print(f"8 x 16 rows from 8 threads in {seconds:.2f} s; keys {sorted(found[0])}; differs by at most {worst:.1e}")
    total = torch.tensor(found[0]["avg"]) - 0.1 * torch.as_tensor(found[0]["jpeg_compressibility"])
    assert torch.allclose(total.float(), direct, atol=1e-4)


def run_flow_factory(checkout: Path) -> None:
    """Flow-Factory's loader and processor, from the dotted path to rewards."""
    sys.path.insert(0, str(checkout / "src"))
    from accelerate import Accelerator
    from flow_factory.hparams import MultiRewardArguments, RewardArguments
    from flow_factory.rewards import MultiRewardLoader, RewardProcessor
    from flow_factory.samples import T2ISample

    reward, prompts, latents, images = flow_samples()
    config = RewardArguments(
        name="latent",
        reward_model="dina_reward.integrations.flow_factory.LatentRewardModel",
        dtype="float32",
        device="cpu",
        batch_size=8,
    )
    config.extra_kwargs = {"model_path": "shapes"}
    loader = MultiRewardLoader(MultiRewardArguments([config]), Accelerator(cpu=True)).load()
    models = loader.get_training_reward_models()
    processor = RewardProcessor(Accelerator(cpu=True), models, {"latent": config}, verbose=False)
    places = torch.tensor([-1, 0, -1, 1])
    stored = [
        T2ISample(
            prompt=prompt,
            all_latents=torch.stack([row + 1, row]),
            latent_index_map=places,
            timesteps=torch.tensor([1000.0, 800.0, 500.0]),
        )
        for prompt, row in zip(prompts, latents, strict=True)
    ]
    found = processor.compute_rewards(stored, store_to_samples=False)["latent"]
    direct = reward(latents, prompts, seed=prompt_seeds(prompts))
    print(f"trajectories: differ by at most {float((found - direct).abs().max()):.1e}")
    assert torch.allclose(found, direct, atol=1e-3)
    shown = [T2ISample(prompt=prompt, image=image) for prompt, image in zip(prompts, images, strict=True)]
    encoded = processor.compute_rewards(shown, store_to_samples=False)["latent"]
    correlation = float(torch.corrcoef(torch.stack([encoded, direct]))[0, 1])
    print(f"pictures alone, as in evaluations: correlation with the scores of their latents {correlation:.3f}")


def run_verl_omni(checkout: Path) -> None:
    """verl-omni's own HTTP client, 18 samples of a group at once, against `dina-reward serve` in a process of its own."""
    for package in ("verl_omni", "verl_omni.utils", "verl_omni.utils.reward_score", "verl_omni.pipelines"):
        sys.modules[package] = types.ModuleType(package)  # theirs import the trainer
        sys.modules[package].__path__ = [str(checkout.joinpath(*package.split(".")))]
    client = importlib.import_module("verl_omni.utils.reward_score.latent_http_scorer_client")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.test_reward import make_reward
    from tests.tiny_models import tiny_sd3_pipeline

    shapes = LatentReward.from_pretrained("shapes", pipeline=load_pipeline())
    with tempfile.TemporaryDirectory() as directory:
        tiny = make_reward(tiny_sd3_pipeline())
        tiny.save_pretrained(f"{directory}/reward")
        tiny.prompt_encoder.pipeline.save_pretrained(f"{directory}/pipeline")
        _serve_verl_omni(client, shapes, [], "pictures and latents, as of output_type both")
        own = [f"--model-path={directory}/reward", f"--base-model-path={directory}/pipeline"]
        _serve_verl_omni(client, tiny, own, "16-channel latents alone, as of output_type latent")


def _serve_verl_omni(client: Any, reward: LatentReward, options: list[str], what: str) -> None:
    from tests.benchmarks.bench_serving import figure, server

    channels = reward.family.latent_channels(reward.config.backbone_config)
    latents = torch.randn(18, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = sample_prompts(1, "held_out", seed=0) * 18
    encoded = reward.encode_prompts(prompts[:1])[0]
    embeddings = {name: getattr(encoded, name)[0] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    pictures = channels != 16

    with server("--dtype=float32", "--max-batch-size=8", "--max-wait-ms=10", *options) as ready:
        url = ready()

        async def score(latent: torch.Tensor) -> dict[str, float]:
            extra = {**embeddings, "latents_clean": latent} if pictures else embeddings
            image = torch.zeros(3, 32, 32, dtype=torch.uint8) if pictures else latent
            scale = {"score_scale": 0.1, "score_bias": 1.0}
            return dict(await client.compute_score(image, prompts[0], extra, f"{url}/v1/score", **scale))

        async def group() -> list[dict[str, float]]:
            try:
                return await asyncio.gather(*(score(latent) for latent in latents))
            finally:
                await (await client._session()).close()

        asyncio.run(group())
        started = time.perf_counter()
        results = asyncio.run(group())
        seconds = time.perf_counter() - started
        misses = figure(url, "dina_reward_prompt_cache_misses_total")
    raw = torch.tensor([result["drm_raw_score"] for result in results])
    direct = reward(latents, prompts, seed=[0] * 18, noise_level=0.4)
    worst = float((raw - direct).abs().max())
    print(
        f"{what}: 18 at once in {seconds:.2f} s; differ from direct scores by at most {worst:.1e}, largest score ",
        end="",
    )
    print(f"{float(direct.abs().max()):.1f}; prompts brought to the device: {misses:.0f}")
    assert worst <= 1e-5
    assert misses == 1
    assert torch.allclose(torch.tensor([result["score"] for result in results]), 0.1 * raw + 1)


def flow_samples() -> tuple[LatentReward, list[str], torch.Tensor, torch.Tensor]:
    """The flow world's reward, and 16 samples as latents and pictures."""
    pipe = load_pipeline()
    reward = LatentReward.from_pretrained("shapes", pipeline=pipe, share_backbone=True)
    prompts = sample_prompts(16, "held_out", seed=0)
    latents = sample_latents(pipe, prompts, torch.manual_seed(0))
    return reward, prompts, latents, reward.family.decode_latents(pipe, latents)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the clients' own code with the reward.")
    parser.add_argument("client", choices=["trl", "flow_grpo", "flow_factory", "verl_omni"])
    parser.add_argument("checkout", type=Path, nargs="?", help="the client's repository; TRL is installed instead")
    parser.add_argument("--epochs", type=int, default=10, help="of TRL's DDPOTrainer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: SimpleNamespace = SimpleNamespace(
        trl=lambda: run_trl(arguments.epochs),
        flow_grpo=lambda: run_flow_grpo(arguments.checkout),
        flow_factory=lambda: run_flow_factory(arguments.checkout),
        verl_omni=lambda: run_verl_omni(arguments.checkout),
    )
    getattr(runs, arguments.client)()


if __name__ == "__main__":
    main()
