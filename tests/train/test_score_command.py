"""`gentron-train score`, `sweep` and `card` on the packaged bundle, with a step or two."""

from __future__ import annotations

import json
import sys

import pytest

from gentron.bundle import locate
from gentron.cli import score, train
from gentron.cli.common import run_command
from gentron.runtime.image_file import read_metadata
from gentron.train import scenes
from gentron.train.scenes import nouns

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--sets", "nouns,pairs", "--sample", "2", "--steps", "1")


@pytest.fixture
def gentron_train(monkeypatch, capfd, tmp_path, font_sprites):
    """Runs a command in an empty folder; the font's sprites are drawn once for all tests."""

    def known(font, names):
        return font_sprites[[nouns().index(name) for name in names]]

    monkeypatch.setattr(scenes, "load_sprites", known)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gentron-train", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(train.cli)
        return (stopped.value.code, *capfd.readouterr())

    return run


def test_score_prints_a_table_and_writes_nothing_unasked(gentron_train, tmp_path):
    code, out, err = gentron_train("score", *QUICK, "-v")
    assert code == 0, err
    lines = out.splitlines()
    header = next(line for line in lines if line.startswith("set "))
    for column in ("generated", "real", "autoencoder", "noise", "other prompt's"):
        assert column in header
    assert sum(line.startswith(("nouns ", "pairs ")) for line in lines) == 6
    assert sum(" rank " in line for line in lines) == 4
    assert "1 steps" in out
    assert max(map(len, lines[lines.index(header) : lines.index(header) + 7])) <= 110
    assert "nouns, generated: 2" in err
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_into_the_same_folder_draws_nothing_again(gentron_train, tmp_path):
    arguments = ("score", *QUICK, "--report", "report")
    assert gentron_train(*arguments)[0] == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    settings, manifest = report["settings"], locate("emoji") / "gentron.json"
    assert settings["steps"] == 1
    assert settings["backend"] == "onnxruntime"
    assert settings["provenance"] == json.loads(manifest.read_text("utf-8"))["provenance"]
    pictures = sorted((tmp_path / "report" / "pictures").rglob("*.png"))
    assert len(pictures) == 4
    asked = [p for values in report["sets"].values() for p in values["pictures"]]
    assert {(p["prompt"], p["seed"]) for p in asked} == {
        (found["prompt"], found["seed"]) for found in map(read_metadata, pictures)
    }
    before = {file: file.stat().st_mtime_ns for file in pictures}
    pictures[0].write_bytes(b"cut off")
    assert gentron_train(*arguments)[0] == 0
    after = {file: file.stat().st_mtime_ns for file in pictures}
    assert [file for file in pictures if before[file] != after[file]] == pictures[:1]
    again = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert again == report


def test_other_settings_draw_the_pictures_anew(gentron_train, tmp_path):
    for steps, solver in ((1, "euler-churn"), (2, "euler-churn"), (2, "euler")):
        assert gentron_train("score", "--sets", "nouns", "--sample", 1, "--steps", steps,
                             "--solver", solver, "--report", "report")[0] == 0  # fmt: skip
        (picture,) = (tmp_path / "report" / "pictures" / "nouns").iterdir()
        drawn_with = read_metadata(picture)
        assert (drawn_with["steps"], drawn_with["solver"]) == (steps, solver)


def test_sweep_writes_its_tables_beside_the_report(gentron_train, tmp_path, monkeypatch):
    from gentron.train import sweep

    monkeypatch.setattr(sweep, "STEP_COUNTS", (1, 2))
    monkeypatch.setattr(sweep, "GUIDANCES", (1.0, 4.0))
    drawn, artist = [], score.Drawer.artist

    def noted(self, name):
        drawn.append(tuple(self.options.values()))
        return artist(self, name)

    monkeypatch.setattr(score.Drawer, "artist", noted)
    code, out, err = gentron_train("sweep", "--sample", 1, "--steps", 1, "--report", "report")
    assert code == 0, err
    found = json.loads((tmp_path / "report" / "sweep.json").read_text("utf-8"))
    scored = {(cell["solver"], cell["steps"], cell["guidance"]): cell for cell in found["cells"]}
    assert {name for name, *_ in scored} == {"ddim", "dpm++2m", "unipc", "euler", "euler-churn"}
    assert len(scored) == len(found["cells"]) == 5 * 2 + 1
    # DDIM draws the same; and a single step has no noise to replace.
    alike = {("euler", 1, 4.0), ("euler", 2, 4.0), ("euler-churn", 1, 4.0)}
    assert {*scored} - {*drawn} == alike
    for steps in (1, 2):
        one, other = ({**scored[name, steps, 4.0], "solver": ""} for name in ("ddim", "euler"))
        assert one == other
    assert "1 steps" in out.splitlines()[1]
    assert (tmp_path / "report" / "sweep.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("score", "--sets", "verbs"), "choose of nouns, colors"),
        (("score", "--solver", "ddpm"), "one of ddim, dpm++2m, unipc, euler"),
        (("score", "--font", "none.ttf"), "fonts-noto-color-emoji"),
        (("score", "-m", "none"), "not found"),
        (("sweep", "--guidance", "nan"), "guidance"),
        (("card", "nowhere"), "gentron-train emoji"),
    ],
)
def test_what_cannot_be_done_is_refused_with_advice(gentron_train, tmp_path, arguments, advice):
    code, out, err = gentron_train(*arguments)
    assert code == 2
    assert out == ""
    assert advice in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_report_is_refused(gentron_train, tmp_path):
    (tmp_path / "report").write_text("")
    code, _, err = gentron_train("score", *QUICK, "--report", "report")
    assert code == 2
    assert "choose another --report" in err
