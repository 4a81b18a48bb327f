"""That the benchmark measures and reports; no test looks at the rates."""

import json
import types

import numpy as np

from vit_flax import benchmark_data


def test_made_up_photographs_are_measured_and_reported(monkeypatch, capsys):
    """Everything but the processes, which would take half a minute."""
    monkeypatch.setattr(benchmark_data, "_ask", _answer_here)
    monkeypatch.setattr(benchmark_data.subprocess, "Popen", lambda *_, **__: _Child())
    make = benchmark_data.make_photographs
    monkeypatch.setattr(benchmark_data, "make_photographs", lambda directory, count: make(directory, count=2))
    given = dict(images=None, peers=False, prepared=True, rounds=2, batches=1, threads=1, child=None)
    monkeypatch.setattr(benchmark_data.flags, "FLAGS", types.SimpleNamespace(**given))
    benchmark_data.main(["benchmark_data"])
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in printed if line.startswith("{")]
    names = benchmark_data.installed(benchmark_data.PIPELINES)
    assert [row["pipeline"] for row in rows] == [*names, *(f"{name}, prepared 256 px" for name in names)]
    assert {row["images_per_cpu_second"] for row in rows} == {10.0}
    assert sum("| vit_flax" in line for line in printed) == len(rows)
    assert any(line.startswith("2 files, ") and line.endswith("; 2 rounds") for line in printed)


def _answer_here(child, request):
    if "files" in request:
        assert all(np.fromfile(file, np.uint8).size for file in request["files"])
        return {}
    return {"per_cpu_second": 10.0, "per_second": 20.0}


class _Child:
    def kill(self):
        pass

    def wait(self):
        pass
