"""Evaluates rewards on several benchmarks and prints one table, as the papers do.

    python recipes/benchmark_rewards.py --config recipes/configs/benchmark_published.yaml \\
        --benchmarks ImageReward=path/to/benchmark-prompts.json HPDv2=path/to/HPDv2/test.json

Supported: latent rewards, PickScore-type CLIP models and any function of latents or images; every schema of
`dina_reward.data.read_preferences`, each under its own tie convention. Not supported: videos.
Every benchmark's full report lands in `output_dir/NAME`; `benchmark.md` and `benchmark.json` hold the table. The command can
be killed and started again: reports that are complete and of the same settings, rewards and data are kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from dina_reward.checkpoints.kept_results import identity, read_result, write_result, write_whole
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.recipes.arguments import parse_command_line


@dataclass
class BenchmarkArguments:
    """What to evaluate on what.

    Raises:
        ValueError: nothing to evaluate, or a benchmark is not written NAME=PATH.
    """

    benchmarks: list[str] = field(metadata={"help": "NAME=PATH of each benchmark; a path, latent cache or hub id."})
    rewards: list[str] = field(default_factory=list, metadata={"help": "Latent rewards: directories or hub ids."})
    clip: list[str] = field(default_factory=list, metadata={"help": "PickScore-type CLIP models."})
    functions: list[str] = field(default_factory=list, metadata={"help": "Dotted names of functions that score."})
    pipeline: str | None = field(
        default=None, metadata={"help": "Diffusers pipeline; null: the backbone that each reward names."}
    )
    split: str = field(default="test", metadata={"help": "Split of every benchmark."})
    levels: list[float] = field(
        default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], metadata={"help": "Single noise levels."}
    )
    ensemble: list[float] | None = field(
        default_factory=lambda: [0.2, 0.5, 0.7], metadata={"help": "Noise levels of an ensemble; null for none."}
    )
    max_pairs: int | None = field(default=None, metadata={"help": "Use the first so many pairs; null: all."})
    batch_size: int = field(default=16, metadata={"help": "Images or latents per pass."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Of noise, sides, resampling and tuning."})
    torch_dtype: str = field(default="float32", metadata={"help": "Of pipeline and backbone: float32, bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even where there is a GPU."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Directory of the reports and the table."})

    def __post_init__(self) -> None:
        if not (self.rewards or self.clip or self.functions):
            raise ValueError("nothing to evaluate: give rewards, clip or functions")
        self.places()

    def places(self) -> dict[str, str]:
        """Path of each benchmark, by name."""
        places = dict(entry.partition("=")[::2] for entry in self.benchmarks)
        wrong = [name for name, path in places.items() if not path or not name or "/" in name]
        if wrong or len(places) < len(self.benchmarks):
            raise ValueError(f"benchmarks must be NAME=PATH with different names, got {self.benchmarks}")
        return places

    def sources(self) -> list[str]:
        """Files that define the functions."""
        specs = [find_spec(name.rpartition(".")[0]) for name in self.functions if "." in name]
        return [spec.origin for spec in specs if spec is not None and spec.origin is not None]


def main(arguments: BenchmarkArguments) -> None:
    """Evaluates what is missing and writes the table."""
    with sole_owner(Path(arguments.output_dir)):
        benchmark(arguments)


def benchmark(arguments: BenchmarkArguments) -> None:
    """What `main` does, in a directory that nothing else writes into."""
    from dina_reward.cli.eval_run import EvalRequest, load_entrants, run_evaluation, write_evaluation
    from dina_reward.evaluation import benchmark_rows, benchmark_table

    output, comparisons, entrants = Path(arguments.output_dir), {}, None
    for name, place in arguments.places().items():
        request = EvalRequest(
            rewards=arguments.rewards,
            dataset=place,
            clip=arguments.clip,
            functions=arguments.functions,
            pipeline=arguments.pipeline,
            split=arguments.split,
            max_pairs=arguments.max_pairs,
            levels=arguments.levels,
            ensembles=[arguments.ensemble] if arguments.ensemble else [],
            resamples=arguments.resamples,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device="cpu" if arguments.use_cpu else None,
            dtype=arguments.torch_dtype,
        )
        done = output / name / "request.json"
        wanted = identity(asdict(request), place, *arguments.rewards, *arguments.clip, *arguments.sources())
        if read_result(done, wanted) is None:
            print(f"{name}: {place} -> {output / name}")
            done.unlink(missing_ok=True)
            entrants = entrants or load_entrants(request)
            write_evaluation(run_evaluation(request, entrants), output / name)
            write_result(done, wanted, {})
        comparisons[name] = json.loads((output / name / "evaluation.json").read_text(encoding="utf-8"))
    table = benchmark_table(comparisons)
    rows = [asdict(row) for row in benchmark_rows(comparisons)]
    write_whole(output / "benchmark.json", json.dumps(rows, indent=2) + "\n")
    write_whole(output / "benchmark.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main(*parse_command_line(BenchmarkArguments))
