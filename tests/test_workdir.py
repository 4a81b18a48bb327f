"""The folder of a run: one writer, one experiment, whole files."""

import inspect
import json
import os
import socket

import pytest

from vit_flax import files, workdir
from vit_flax.config import ConfigError
from vit_flax.data import SOURCES
from vit_flax.sections import SECTIONS

CONFIG = {
    "run": {"seed": 0, "log_every_steps": 5},
    "model": {"width": 8, "pair": (1, 2)},
    "checkpoint": {"keep_last": 2},
}


def test_lock_names_host_and_process(tmp_path):
    owner = f"in use by process {os.getpid()} on {socket.gethostname()}"
    with workdir.lock(tmp_path), pytest.raises(RuntimeError, match=owner), workdir.lock(tmp_path):
        pass
    with workdir.lock(tmp_path):  # free again
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    """Lustre, mounted without them; a bucket."""

    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    message = rf"{tmp_path} has no locks \(Function not implemented\).*choose another --workdir"
    with pytest.raises(OSError, match=message), workdir.lock(tmp_path):
        pass


def test_a_workdir_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        message = rf"The workdir {place} cannot be written .*Choose a --workdir"
        with pytest.raises(OSError, match=message), workdir.lock(place):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_every_key_that_differs_is_named(tmp_path):
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = (tmp_path / "config.json").read_bytes()
    other = {
        "run": {"seed": 1, "log_every_steps": 9},
        "model": {"pair": (1, 3), "new": 1},
        "checkpoint": {"keep_last": 3},
    }
    with pytest.raises(ConfigError) as error:
        workdir.claim(tmp_path, other, given=other)
    rows = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert rows == [
        "model.new: there absent, here 1",
        "model.pair: there [1, 2], here [1, 3]",
        "model.width: there 8, here absent",
        "run.seed: there 0, here 1",
    ]
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("trained", ["metrics.jsonl", "checkpoints/1", "checkpoints/damaged", "checkpoints/2.tmp"])
def test_only_what_never_took_a_step_is_replaced(trained, tmp_path):
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    (tmp_path / "metrics.jsonl").touch()
    for name in ("0", "replaced/0"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    other = {**CONFIG, "model": {"width": 9}}
    workdir.claim(tmp_path, other, given=other)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["model"] == {"width": 9}
    if trained == "metrics.jsonl":
        (tmp_path / trained).write_text('{"step": 1}\n')
    else:
        (tmp_path / trained).mkdir()
    with pytest.raises(ConfigError, match="holds another experiment"):
        workdir.claim(tmp_path, CONFIG, given=CONFIG)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(workdir.path("~/runs/a")) == "/home/me/runs/a"


def test_what_changes_no_numbers_may_differ(tmp_path):
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    workdir.claim(tmp_path, {**CONFIG, "run": {"seed": 0, "log_every_steps": 9}, "checkpoint": {}}, given=CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["run"]["log_every_steps"] == 9


def test_what_may_differ_is_a_section_or_a_key():
    """An entry whose key was renamed would let nothing differ."""
    for name in workdir.MAY_CHANGE:
        section, *path = name.removesuffix(".").split(".")
        schema = SECTIONS[section][0]
        if name.endswith("."):
            continue
        known = {*inspect.signature(schema).parameters}
        known |= {key.removesuffix("_steps") + "_epochs" for key in known if key.endswith("_steps")}
        assert path[0] in known, name
        if path[1:]:  # data.source.KEY
            takes = {key for source in SOURCES.values() for key in inspect.signature(source).parameters}
            assert path[1] in takes, name


def test_files_of_nobody_knows_what_run_are_not_written_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(ConfigError, match=r"has metrics\.jsonl, but no config\.json"):
        workdir.claim(tmp_path, CONFIG, given=CONFIG)
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)  # whose record says what it is of
    workdir.claim(tmp_path, CONFIG, given=CONFIG)


def test_check_changes_nothing(tmp_path):
    assert workdir.check(tmp_path, CONFIG) is None
    assert list(tmp_path.iterdir()) == []
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    assert workdir.check(tmp_path, CONFIG)["config"]["model"]["width"] == 8
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', "\x00\x01"])
def test_a_damaged_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        workdir.claim(tmp_path, CONFIG, given=CONFIG)


def test_other_software_is_named(tmp_path, caplog):
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    assert caplog.text == ""
    record = json.loads((tmp_path / "config.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(record))
    workdir.claim(tmp_path, CONFIG, given=CONFIG)
    assert "goes on with other software (jax 0.0.1 -> " in caplog.text


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    files.write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(path, "new")
        assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
