"""Better samples without training: half-finished samples are judged, and only the better ones are finished.

    python examples/08_better_samples_without_training.py

The reward scores a noisy state as it is, at its own level, so nothing is decoded on the way. Halving gives poor samples up
after 4 and 6 of 10 steps. Stepwise selection draws four successors of every state and goes on with the best: they share one
call of the denoiser, so at equal calls it finds the most.
"""

import sys

from dina_reward.search import Halving, result_grid, search, write_page
from dina_reward.shapes import Oracle, load_pipeline, load_reward, sample_prompts


count = int(sys.argv[1]) if len(sys.argv) > 1 else 24
pipe = load_pipeline()
reward = load_reward(pipeline=pipe, share_backbone=True)
prompts = sample_prompts(count, "held_out", seed=1)
oracle = Oracle()
common = {"num_inference_steps": 10, "max_sequence_length": 6, "batch_size": 96}


def show(name, result):
    """What an oracle says that knows the truth; the search has not seen it."""
    scores = oracle(result.images(), result.prompts)
    calls = result.denoiser_calls // len(prompts)
    fit, cleanness = scores.fit.mean(), scores.cleanness.mean()
    print(f"{name:24} fit {fit:.3f}  cleanness {cleanness:.3f}  {calls} denoiser calls per prompt")


show("one sample", search(pipe, reward, prompts, method="best_of_n", budget=1, **common))
show("best of 8, at the end", search(pipe, reward, prompts, method="best_of_n", budget=8, **common))
show("best of 8, early", search(pipe, reward, prompts, method=Halving(candidates=8), budget=8, **common))
show("halving, same calls", search(pipe, reward, prompts, method="halving", budget=8, **common))
result = search(pipe, reward, prompts, method="stepwise", budget=8, return_pairs=True, **common)
show("stepwise, same calls", result)

print("the first sample on its way:")
for ancestor in result.lineage(0):
    print(f"  after step {ancestor.step:2}: score {ancestor.score:6.2f}, rank {ancestor.rank + 1} of its prompt")

clean = [pair.training_row() for pair in result.pairs if not pair.noise_level]
print(
    f"{len(result.pairs)} pairs of chosen and rejected samples, {len(clean)} of them clean: rows for LatentRewardTrainer"
)
result_grid(result).save("better_samples.png")
write_page(result, "better_samples_report.png")
print("wrote better_samples.png and better_samples_report.png")
