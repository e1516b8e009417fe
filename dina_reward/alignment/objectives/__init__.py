"""What rewards of a batch turn into: advantages, step-wise credit, and the policy-gradient losses over recorded steps.

Pure functions of tensors: no models, no sampling, no logs; what one algorithm alone needs stays in its trainer's
file. Begin at `advantages.compute_advantages`, then `policy_gradient.get_objective`.
"""
