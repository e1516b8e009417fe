"""Jobs run in processes of their own, are kept when done, and say where they failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dina_reward.shapes.jobs import Job, run_jobs, threads_per_job


def job(directory: Path, code: str) -> Job:
    return Job(["-c", code, directory / "result.json"], directory / "result.json")


WRITE = "import os, sys; print('hello'); open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"


def test_jobs_leave_results_and_logs_and_are_not_run_again(tmp_path: Path) -> None:
    run_jobs([job(tmp_path / name, WRITE) for name in ("one", "two", "three")], at_once=2)
    for name in ("one", "two", "three"):
        assert (tmp_path / name / "result.json").read_text() == str(threads_per_job(2))
        assert (tmp_path / name / "log.txt").read_text() == "hello\n"
    before = (tmp_path / "one" / "result.json").stat().st_mtime_ns
    run_jobs([job(tmp_path / "one", WRITE)], at_once=1)
    assert (tmp_path / "one" / "result.json").stat().st_mtime_ns == before


def test_a_result_of_another_job_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run_jobs([job(tmp_path, WRITE)], at_once=1)
    run_jobs([job(tmp_path, WRITE.replace("OMP_NUM_THREADS", "PATH"))], at_once=1)
    assert (tmp_path / "result.json").read_text() == os.environ["PATH"]
    with pytest.raises(RuntimeError, match="ended with 1"):
        run_jobs([job(tmp_path, "raise SystemExit(1)")], at_once=1)
    assert not (tmp_path / "result.json").exists()


def test_results_of_earlier_versions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    run_jobs([job(tmp_path, "raise SystemExit(1)")], at_once=1)


def test_a_failure_names_the_log_and_stops_what_waits(tmp_path: Path) -> None:
    jobs = [job(tmp_path / "bad", "raise SystemExit(3)"), job(tmp_path / "next", WRITE), job(tmp_path / "last", WRITE)]
    with pytest.raises(RuntimeError, match=r"ended with 3 .*log\.txt"):
        run_jobs(jobs, at_once=1)
    assert not (tmp_path / "last" / "result.json").exists()
    with pytest.raises(RuntimeError, match="ended with 0 and should have written"):
        run_jobs([job(tmp_path / "silent", "pass")], at_once=1)


def test_threads_share_the_cores() -> None:
    assert threads_per_job(1) == os.cpu_count()
    assert threads_per_job(10_000) == 1
