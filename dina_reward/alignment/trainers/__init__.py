"""One trainer per algorithm on the common `base.AlignmentTrainer`, each with its configuration and what it alone needs.

Sampling, rewards and advantages may not be worked out here; trainers ask `experience` for them. Begin at
`base.AlignmentTrainer`, then `grpo.DiffusionGRPOTrainer`.
"""
