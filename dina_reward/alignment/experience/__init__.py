"""A generation of experience: rollouts of the policy, the rewards of their latents, advantages of each micro-batch.

No loss and no optimizer step is made here, and held-out prompts belong to `monitoring`. Begin at
`maker.ExperienceMaker`, then `rewards.RewardSet`.
"""
