"""Iterations of our trainers beside those of TRL and flow_grpo: equal models, samples and steps, a reward that is free.

    pip install -e ".[train]" trl==0.23.1   # the last with DDPOTrainer; in an environment of its own
    git clone https://github.com/yifan123/flow_grpo && git -C flow_grpo checkout ac4c86e
    python tests/benchmarks/bench_trainers.py --flow-grpo flow_grpo --output tests/benchmarks/results

Both run on the embedded world's generators, turn by turn in one process, on one thread; CPU time is compared. Of TRL it is
`DDPOTrainer.step`, whole, as it is (decoding every sample) and on latents (`dina_reward.integrations.LatentOutput`). Of
flow_grpo they are its sampling function and its log-probabilities; the loop around them is written here as its
``scripts/train_sd3.py`` has it, a forward and a backward pass for each step and micro-batch, since the script itself cannot
run without its models.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dina_reward.alignment import DDPOConfig, DDPOTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from dina_reward.integrations import LatentOutput
from dina_reward.shapes import load_pipeline, sample_prompts, weights_dir


ROWS, MICRO_BATCHES, STEPS, TRAINED, RANK = 32, 2, 10, 9, 4
"""Samples of a micro-batch, micro-batches of an iteration, sampling steps, those trained, rank of the LoRA."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "faster": {"timesteps_per_forward": 3, "merge_for_rollout": True, "rollout_batch_size": ROWS * MICRO_BATCHES},
}
ETA, GUIDANCE = 0.7, 1.001
"""Noise of flow_grpo's steps; TRL's wrapper cannot sample without guidance, so both do it with next to none."""


def brightness(latents: Tensor) -> Tensor:
    """A reward that costs nothing."""
    return latents.float().flatten(1).mean(dim=1)


class Turns(TrainerCallback):
    """After each iteration of our trainer one of every other; the first turn warms up.

    Args:
        others: iterations of theirs, by name.
    """

    def __init__(self, others: Mapping[str, Callable[[], None]]) -> None:
        self.others = others
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % MICRO_BATCHES:
            return
        self.seconds["ours"].append(time.process_time() - self._mark)
        for name, iteration in self.others.items():
            started = time.process_time()
            iteration()
            self.seconds[name].append(time.process_time() - started)
        self._mark = time.process_time()

    def summary(self) -> dict[str, Any]:
        """Medians of all turns but the first, and those of what the others take over what ours does in the same turn."""
        ours = self.seconds["ours"][1:]
        ratios = {name: [a / b for a, b in zip(self.seconds[name][1:], ours, strict=True)] for name in self.others}
        return {
            "CPU seconds": {name: statistics.median(values[1:]) for name, values in self.seconds.items()},
            "ratios": {f"{name} / ours": statistics.median(values) for name, values in ratios.items()},
            "extremes": {f"{name} / ours": [min(values), max(values)] for name, values in ratios.items()},
        }


def compare(
    trainer_class: type, config_class: type, world: str, others: Mapping[str, Callable[[], None]], repeats: int
) -> dict[str, Any]:
    """Our iteration, as it is and with what makes it faster, beside those of others."""
    result = {}
    for name, settings in VARIANTS.items():
        with tempfile.TemporaryDirectory() as directory:
            config = config_class(**own_settings(directory, config_class, repeats + 1), **settings)
            turns = Turns(others)
            prompts = sample_prompts(ROWS * MICRO_BATCHES, "train", seed=0)
            trainer = trainer_class(load_pipeline(world), brightness, config, prompts, callbacks=[turns])
            trainer.train()
        trained = sum(p.numel() for p in trainer.policy.trainable_parameters().values())
        result[name] = {**turns.summary(), "trained parameters": trained}
    return result


def own_settings(directory: str, config_class: type, iterations: int) -> dict[str, Any]:
    """Of our trainer: what theirs are set to."""
    if config_class is DDPOConfig:
        kind = {"guidance_scale": GUIDANCE, "per_prompt_stat_tracking": False, "num_generations": 1}
    else:
        kind = {"guidance_scale": 1.0, "sde_type": "flow_sde", "eta": ETA, "num_generations": 8}
    return {
        "output_dir": directory,
        "height": 32,
        "width": 32,
        "max_sequence_length": 6,
        "per_device_train_batch_size": ROWS,
        "steps_per_generation": MICRO_BATCHES,
        "max_steps": MICRO_BATCHES * iterations,
        "num_inference_steps": STEPS,
        "sde_window_size": TRAINED,
        "sde_window_range": [0, TRAINED],
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "ema_decay": None,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "use_cpu": True,
        **kind,
    }


def trl_iterations() -> dict[str, Callable[[], None]]:
    """`DDPOTrainer.step` of TRL, decoding and on latents."""
    from accelerate import PartialState

    PartialState(cpu=True)  # TRL's wrapper logs before its trainer has made one
    from trl import DDPOConfig as TheirConfig
    from trl import DDPOTrainer as TheirTrainer
    from trl import DefaultDDPOStableDiffusionPipeline

    class OnLatents(LatentOutput, DefaultDDPOStableDiffusionPipeline):
        pass

    def reward(images: Tensor, prompts: Any, metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        return brightness(images), {}

    iterations: dict[str, Callable[[], None]] = {}
    for name, wrapper in (("TRL", DefaultDDPOStableDiffusionPipeline), ("TRL on latents", OnLatents)):
        prompts = iter(sample_prompts(10**5, "train", seed=0))
        pipeline = wrapper(str(weights_dir("ddpm")))
        pipeline.sd_pipeline.unet.to(memory_format=torch.channels_last)  # as `load_pipeline` has it
        config = TheirConfig(
            num_epochs=1,
            sample_num_steps=STEPS,
            sample_batch_size=ROWS,
            sample_num_batches_per_epoch=MICRO_BATCHES,
            sample_guidance_scale=GUIDANCE,
            train_batch_size=ROWS,
            train_gradient_accumulation_steps=1,
            train_timestep_fraction=TRAINED / STEPS,
            per_prompt_stat_tracking=False,
            mixed_precision="no",
            log_with=None,
            save_freq=10**9,
            project_kwargs={"project_dir": tempfile.mkdtemp(), "automatic_checkpoint_naming": True},
        )
        trainer = TheirTrainer(config, reward, lambda prompts=prompts: (next(prompts), {}), pipeline)
        epochs = iter(range(1, 10**6))
        iterations[name] = lambda trainer=trainer, epochs=epochs: trainer.step(next(epochs), 1)
    return iterations


def flow_grpo_iterations(checkout: Path) -> dict[str, Callable[[], None]]:
    """flow_grpo's sampling and log-probabilities in a loop like that of its script."""
    from peft import LoraConfig, get_peft_model

    sys.path.insert(0, str(checkout))
    sampling: Any = importlib.import_module("flow_grpo.diffusers_patch.sd3_pipeline_with_logprob")
    pipeline = load_pipeline("flow")
    pipeline.set_progress_bar_config(disable=True)
    projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if module is not None:
            module.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=projections)
    pipeline.transformer = get_peft_model(pipeline.transformer.requires_grad_(False), lora)
    trained = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=1e-4)
    groups = [prompt for prompt in sample_prompts(ROWS * MICRO_BATCHES // 8, "train", seed=0) for _ in range(8)]

    def iteration() -> None:
        samples = [sampled(groups[part * ROWS : (part + 1) * ROWS]) for part in range(MICRO_BATCHES)]
        rewards = torch.cat([each["rewards"] for each in samples]).view(-1, 8)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        for sample, advantage in zip(samples, advantages.flatten().split(ROWS), strict=True):
            for step in range(TRAINED):
                loss_of(sample, advantage, step).div(TRAINED).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def sampled(prompts: list[str]) -> dict[str, Any]:
        pipeline.transformer.eval()
        with torch.no_grad():
            embeddings, _, pooled, _ = pipeline.encode_prompt(
                prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=6
            )
            images, states, log_probs = sampling.pipeline_with_logprob(
                pipeline,
                prompt_embeds=embeddings,
                pooled_prompt_embeds=pooled,
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                output_type="pt",
                height=32,
                width=32,
                max_sequence_length=6,
                noise_level=ETA,
            )
        pipeline.transformer.train()
        return {
            "embeddings": embeddings,
            "pooled": pooled,
            "states": states,
            "log_probs": log_probs,
            "timesteps": pipeline.scheduler.timesteps,
            "rewards": brightness(images),
        }

    def loss_of(sample: dict[str, Any], advantage: Tensor, step: int) -> Tensor:
        timestep = sample["timesteps"][step].expand(ROWS)
        prediction = pipeline.transformer(
            hidden_states=sample["states"][step],
            timestep=timestep,
            encoder_hidden_states=sample["embeddings"],
            pooled_projections=sample["pooled"],
            return_dict=False,
        )[0]
        log_prob = sampling.sde_step_with_logprob(
            pipeline.scheduler,
            prediction.float(),
            timestep,
            sample["states"][step].float(),
            prev_sample=sample["states"][step + 1].float(),
            noise_level=ETA,
        )[1]
        ratio = torch.exp(log_prob - sample["log_probs"][step])
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()

    return {"flow_grpo": iteration}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow-grpo", type=Path, help="clone of flow_grpo; without it only TRL is compared")
    parser.add_argument("--repeats", type=int, default=5, help="iterations, of which the median counts")
    parser.add_argument("--output", type=Path, help="directory for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU time then is that of the work
    packages = ("torch", "diffusers", "transformers", "peft", "trl")
    result: dict[str, Any] = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "samples": ROWS * MICRO_BATCHES,
        "steps": STEPS,
        "trained steps": TRAINED,
        "DDPO": compare(DDPOTrainer, DDPOConfig, "ddpm", trl_iterations(), arguments.repeats),
    }
    if arguments.flow_grpo is not None:
        others = flow_grpo_iterations(arguments.flow_grpo)
        result["Flow-GRPO"] = compare(DiffusionGRPOTrainer, DiffusionGRPOConfig, "flow", others, arguments.repeats)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in result["device"].lower()).strip("-")
        (arguments.output / f"trainers-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
