"""Samplers as policies: which prompts, which noise, which steps, and the log-probability of each stochastic step.

No generator, reward or trainer is known here; a model is a function of latents and timestep. Begin at
`rollout.sample`, then `samplers.FlowSampler` and the formulas in `steps` and `ddim`.
"""
