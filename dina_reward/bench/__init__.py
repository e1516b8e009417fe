"""What scoring, training and sampling cost on the machine at hand, against what the machine can do.

Here live the subjects (a generator with a reward, of real or of random weights), the timing of one row, the rows themselves
and the report; no model code may. Begin at `run_bench`.
"""

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.bench.machine import Machine, measure_machine
    from dina_reward.bench.report import BenchReport
    from dina_reward.bench.rows import Row
    from dina_reward.bench.run import BenchSettings, run_bench
    from dina_reward.bench.subject import Subject, loaded_subject, random_subject

__getattr__, __dir__, __all__ = lazy_exports(__name__)
