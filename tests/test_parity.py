"""The parity command: what it runs, when it fails, and the table that it rewrites; goldens need no other library."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from vit_flax.convert import __main__ as command
from vit_flax.convert.parity import golden, run
from vit_flax.convert.parity.case import Case, Reference, random_tensor

GOLDEN = Path(__file__).parent / "golden"
NAME = "vit_jax_prelinen"
SMALL = golden.golden("google", NAME, "its own code", "1", (32, 32))


@pytest.fixture
def only_small(monkeypatch):
    monkeypatch.setattr(run, "all_cases", lambda: [SMALL])


def reference_that_is(scale):
    """A case like `SMALL` whose reference is another function of the same weights."""

    def build(seed):
        right = SMALL.build(seed)
        return golden.Golden(write=right.write, apply=lambda x: right.apply(x) * np.float32(scale), images=right.images)

    return dataclasses.replace(SMALL, build=build)


def test_every_case_is_complete_and_named_once():
    cases = run.all_cases()
    names = [(case.family, case.name, case.library) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert case.image_sizes
        assert case.library


def test_every_golden_of_google_is_in_the_table():
    kept = {path.name.removesuffix(".ckpt.npz") for path in GOLDEN.glob("*.ckpt.npz")}
    assert {n for n in kept if n.startswith(("vit_jax", "big_vision"))} <= {case.name for case in run.all_cases()}


def test_agreement_and_the_table(only_small, tmp_path, capsys):
    page = tmp_path / "weights.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    assert command.main(["--parity", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{run.BEGIN}\n| family | architecture |")
    assert text.endswith(f"\n{run.END}\nafter\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if NAME in line)
    assert line in capsys.readouterr().out
    assert line.startswith(f"| google | {NAME} | its own code 1 | 32x32 | 0.59 | ")
    # Again: the same page, but for the last digits that differ from machine to machine.
    command.main(["--parity", "--write", str(page)])
    assert len(page.read_text().splitlines()) == len(text.splitlines())


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.0001, 1), (np.nan, 1)])
def test_disagreement_is_a_failure(scale, status, monkeypatch, capsys):
    monkeypatch.setattr(run, "all_cases", lambda: [reference_that_is(scale)])
    assert command.main(["--parity"]) == status
    assert ("ABOVE THE TOLERANCE" in capsys.readouterr().out) == bool(status)


def test_reference_that_breaks_is_a_failure_and_the_rest_runs(monkeypatch, capsys):
    def build(seed):
        raise RuntimeError("its C++ part is missing")

    monkeypatch.setattr(run, "all_cases", lambda: [dataclasses.replace(SMALL, name="broken", build=build), SMALL])
    assert command.main(["--parity"]) == 1
    printed = capsys.readouterr().out
    assert "broken | FAILED, RuntimeError: its C++ part is missing" in printed
    assert f"| google | {NAME} |" in printed


def test_reference_that_breaks_loses_no_line_of_the_page(monkeypatch, tmp_path, capsys):
    def build(seed):
        raise RuntimeError("its C++ part is missing")

    monkeypatch.setattr(run, "all_cases", lambda: [dataclasses.replace(SMALL, name="broken", build=build), SMALL])
    page = tmp_path / "weights.md"
    page.write_text(f"{run.BEGIN}\nkept\n{run.END}\n")
    assert command.main(["--parity", "--write", str(page)]) == 2
    assert "was not changed, since lines would be lost: 1 cases failed (google broken)" in capsys.readouterr().err
    assert page.read_text() == f"{run.BEGIN}\nkept\n{run.END}\n"


def test_other_family_than_expected_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(run, "all_cases", lambda: [dataclasses.replace(SMALL, family="big_vision")])
    assert command.main(["--parity"]) == 1
    assert "recognised as 'google', expected 'big_vision'" in capsys.readouterr().out


def test_library_that_is_absent_is_said_and_loses_no_line(monkeypatch, tmp_path, capsys):
    absent = Case("hf_vit", "Some", "no_such_library", lambda seed: pytest.fail("was built"), ((32, 32),))
    monkeypatch.setattr(run, "all_cases", lambda: [absent])
    assert command.main(["--parity"]) == 0
    assert "not run, no_such_library is not installed: hf_vit Some" in capsys.readouterr().err
    page = tmp_path / "weights.md"
    page.write_text(f"{run.BEGIN}\nkept\n{run.END}\n")
    assert command.main(["--parity", "--write", str(page)]) == 2
    assert "install no_such_library" in capsys.readouterr().err
    assert page.read_text() == f"{run.BEGIN}\nkept\n{run.END}\n"


def test_cases_that_nothing_matches_are_an_error(only_small, capsys):
    assert command.main(["--parity", "--only", "^google vit_jax_pre"]) == 0
    assert command.main(["--parity", "--only", "gogle"]) == 2
    assert f"--only 'gogle' matches none of the cases, which are\n  google {NAME}\n" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [(["--only", "x"], "leave --only out"), ([], "once each, around")])
def test_table_that_cannot_be_written(arguments, message, only_small, tmp_path, capsys):
    page = tmp_path / "weights.md"
    page.write_text("no markers")
    assert command.main(["--parity", "--write", str(page), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert page.read_text() == "no markers"


def model_in_numpy():
    """A reference in our own words, so that other sizes and gradients can be tried without another library."""
    import jax

    from vit_flax import load_pretrained

    def apply(images):
        loaded = load_pretrained(GOLDEN / f"{NAME}.ckpt.npz", image_size=images.shape[1:3])
        call = jax.jit(lambda p, x: loaded.model.apply({"params": p}, x, train=False)[0])
        with jax.default_matmul_precision("highest"):
            return np.asarray(call(loaded.params, jax.numpy.asarray(images)))

    def write(folder):
        return Path(shutil.copy(GOLDEN / f"{NAME}.ckpt.npz", folder))

    return write, apply


def test_other_sizes_are_resampled_and_gradients_travel_through_the_table(tmp_path, monkeypatch):
    import jax
    from flax.traverse_util import flatten_dict

    from vit_flax import load_pretrained
    from vit_flax.convert.engine import write as to_tensors
    from vit_flax.convert.families import FAMILIES

    write, apply = model_in_numpy()
    loaded = load_pretrained(GOLDEN / f"{NAME}.ckpt.npz")

    def gradients(scale):
        def make(images, cotangent, folder):
            def total(params):
                logits, _ = loaded.model.apply({"params": params}, jax.numpy.asarray(images), train=False)
                return (logits * cotangent).sum()

            with jax.default_matmul_precision("highest"):
                found = jax.jit(jax.grad(total))(loaded.params)
            flat = {k: np.asarray(v) * np.float32(scale) for k, v in flatten_dict(found, sep="/").items()}
            tensors, _ = to_tensors(flat, FAMILIES["google"].rows(loaded.model))
            np.savez(folder / "gradients.npz", **tensors)
            return folder / "gradients.npz"

        return make

    sizes = ((32, 32), (48, 24))
    for scale, ok in ((1.0, True), (1.001, False)):
        case = Case(
            "google", NAME, "x", lambda seed, s=scale: Reference(write, apply, gradients(s)), sizes, version="1"
        )
        first, second = run.run(case, np.zeros((4, 4, 3), np.uint8))
        assert first.gradient is not None
        assert (first.gradient <= run.TOLERANCE) == first.ok == ok
        assert second.gradient is None
        assert "48x24, resampled" in second.line()


def test_random_weights_make_every_part_matter():
    rng = np.random.default_rng(0)
    assert random_tensor("mlp.fc1.weight", (64, 256), rng).std() == pytest.approx(1 / 16, rel=0.1)
    assert random_tensor("norm.weight", (512,), rng).mean() == pytest.approx(1, abs=0.02)
    assert random_tensor("mlp.fc1.bias", (512,), rng).std() == pytest.approx(0.1, rel=0.2)
    assert random_tensor("pos_embed", (1, 16, 64), rng).std() == pytest.approx(0.5, rel=0.1)
