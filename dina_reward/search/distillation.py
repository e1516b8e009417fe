"""Training on what search finds, so that plain sampling becomes as good: weighted denoising of the best samples.

    loss = mean_i w_i |v_theta(x_t) - target_i|^2

Every generation searches some prompts with the policy as it is, keeps the best samples of each, and trains on them under
fresh noise (expert iteration; as reward-ranked fine-tuning, RAFT, arXiv 2304.06767, with search in place of best-of-N).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dina_reward.alignment.experience.maker import Experience
from dina_reward.alignment.objectives.policy_gradient import ObjectiveOutput
from dina_reward.alignment.sampling.rollout import Rollout
from dina_reward.alignment.sampling.seeding import Stream
from dina_reward.alignment.trainers.forward_process import ForwardProcessConfig, ForwardProcessTrainer
from dina_reward.checks.values import check_choice, check_real
from dina_reward.noise.draws import fold_seed
from dina_reward.search.api import METHODS, sampler_of
from dina_reward.search.judge import Judge
from dina_reward.search.run import SearchRun
from dina_reward.search.steering import normalised_weights


@dataclass
class SearchDistillationConfig(ForwardProcessConfig):
    """Settings of `SearchDistillationTrainer`."""

    samples_ahead: ClassVar[bool] = False  # the reward scores between the steps of a search
    trains_on_rows: ClassVar[bool] = False

    num_generations: int = field(default=2, metadata={"help": "Samples per prompt that search keeps to train on."})
    search_method: str = field(
        default="halving", metadata={"help": "Method of `dina_reward.search`, with its default settings."}
    )
    search_budget: float = field(
        default=8.0, metadata={"help": "Denoiser calls of a search per prompt, in whole samples."}
    )
    weight_strength: float = field(
        default=0.0,
        metadata={
            "help": "Samples of a prompt are weighted by exp(strength z), z in units of calibrated preference. 0: all alike."
        },
    )

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_choice("search_method", self.search_method, tuple(METHODS))
        check_real(self, "search_budget", 1.0, 1e6)
        check_real(self, "weight_strength", 0.0, 1e6)

    def _check_geometry(self) -> None:
        rows, group = self.per_device_train_batch_size, self.num_generations
        if rows % group:
            raise ValueError(
                f"per_device_train_batch_size {rows} is not a multiple of num_generations {group}, so the samples of a "
                f"prompt would be split over ranks; set it to {-(-rows // group) * group}"
            )
        super()._check_geometry()


class SearchDistillationTrainer(ForwardProcessTrainer):
    """Fine-tunes a pipeline on the samples that search finds with it; see `AlignmentTrainer` for the arguments.

    Reward functions are told latents, prompts, embeddings and seeds; columns of the prompt dataset are not passed on.

    Examples:
        >>> args = SearchDistillationConfig("out", search_method="halving", search_budget=8, num_generations=2)
        >>> trainer = SearchDistillationTrainer(pipe, reward, args, train_dataset=["a cat", "a dog"])
        >>> trainer.train()
    """

    args: SearchDistillationConfig

    @torch.no_grad()
    def make_experience(self, generation: int) -> tuple[list[Experience], dict[str, float]]:
        """The best samples of one search per prompt."""
        geometry, rank = self.experience_maker.prompts.geometry, self.accelerator.process_index
        parts = [self._search(generation, geometry.rows_of(chunk, rank)) for chunk in range(geometry.num_chunks)]
        rewards = self.accelerator.gather(torch.cat([part.rewards for part in parts]))
        return parts, {"reward": float(rewards.mean()), "reward_std": float(rewards.std(unbiased=False))}

    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """Weighted squared error of the prediction, of one micro-batch at the draws of levels and noise of a pass."""
        positions = self.args.joint_positions(position)
        together = len(positions)
        noise, point = self.draw(experience, positions, experience.rows)
        latents = experience.rollout.latents.repeat(together, *[1] * (noise.dim() - 1))
        noisy = self.forward_process.noisy(latents, noise, point).to(self.policy.storage_dtype)
        target = self.forward_process.target(latents, noise, point)
        conditioning = experience.conditioning[experience.prompt_index * together]
        predict = self.policy.bind(conditioning, experience.negative, model)
        errors = (predict(noisy, point.timestep) - target).square().flatten(start_dim=1).mean(dim=1)
        loss = (experience.weights.repeat(together) * errors).mean()
        return ObjectiveOutput(loss, {"error": errors.detach().mean()})

    def _search(self, generation: int, rows: range) -> Experience:
        args, maker, device = self.args, self.experience_maker, self.accelerator.device
        conditioning, prompt_rows, prompt_index = maker.encode(generation, rows)
        texts = [row["prompt"] for row in prompt_rows]
        method = METHODS[args.search_method]()
        judge = Judge(
            self.policy, list(self.rewards.functions), weights=self.reward_weights, settings=self.rewards.settings
        )
        run = SearchRun(
            generator=self.policy,
            judge=judge,
            sampler=sampler_of(self.policy, method, args.num_inference_steps, maker.latent_shape, device=device),
            prompts=texts[:: args.num_generations],
            latent_shape=tuple(maker.latent_shape),
            device=device,
            budget=args.search_budget,
            keep=args.num_generations,
            batch_size=args.per_device_train_batch_size,
            seed=fold_seed(args.seed, Stream.SEARCH, generation, rows.start),
        )
        found, scores = method.run(run)
        return Experience(
            generation=generation,
            rows=rows,
            rollout=Rollout(found.latents),
            prompts=texts,
            conditioning=conditioning,
            prompt_index=prompt_index,
            negative=self.policy.encode_negative(device),
            rewards=scores.to(device),
            advantages=torch.zeros(len(rows), device=device),
            weights=self._weights(scores / judge.unit(None), found.prompt).to(device),
        )

    def _weights(self, values: Tensor, prompt: list[int]) -> Tensor:
        """Weights of samples with a mean of 1 inside each prompt."""
        return self.args.num_generations * normalised_weights(self.args.weight_strength * values, prompt)
