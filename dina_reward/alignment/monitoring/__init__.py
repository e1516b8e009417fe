"""How a run is watched: held-out prompts, judges that training does not see, the alarm for reward hacking, pictures.

Nothing here changes what is trained, except that the alarm may stop the run. Begin at
`evaluation.HeldOutEvaluator`, then `hacking.RewardHackingCallback`.
"""
