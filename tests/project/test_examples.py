"""The examples and training scripts run, at a small size; that they work is tested here, what they print is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from example_modules import load


@pytest.mark.slow
def test_a_users_own_cnn_learns_to_adapt_in_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = load("examples/wrap_your_cnn.py", monkeypatch).main(meta_steps=10, tasks_to_test=10)
    assert accuracy > 0.4, "chance is 0.2"


@pytest.mark.slow
def test_the_sinusoid_example_draws_its_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load("examples/sinusoid.py", monkeypatch).main(meta_steps=10, out=str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_rate_turns_negative_where_the_support_labels_have_the_wrong_sign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = load("examples/negative_rates.py", monkeypatch).main(meta_steps=70)
    assert float(learner.learning_rates["weight"].detach()[0]) < -0.5
    before, after = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "target loss" in line)
    assert after < before / 3


def test_the_omniglot_benchmark_reads_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("benchmarks/accuracy/omniglot.py", monkeypatch)
    asked: list[object] = []
    monkeypatch.setattr(bench, "train", lambda settings, out, resume: asked.append((settings, out, resume)) or {})
    monkeypatch.setattr(bench, "result_text", lambda result: "a table")
    monkeypatch.setattr(
        sys, "argv", ["omniglot.py", "--ways", "5", "--preset", "paper", "--seeds", "3", "--out", "here"]
    )
    bench.main()
    ((settings, out, resume),) = asked
    assert (settings.ways, settings.preset, settings.seed, settings.iterations_per_epoch) == (5, "paper", 3, 500)
    assert (out, resume) == ("here", False)
