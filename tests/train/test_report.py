"""What a report folder holds, and what a card says of it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gentron.errors import OutputError, RequestError
from gentron.train import card, sweep
from gentron.train.card import training_hours, training_text, write_card
from gentron.train.prompts import Prompt, noise_seed, prompt_sets
from gentron.train.report import (
    RANDOM_GRID,
    REPORT,
    REPORT_TEXT,
    WORST_GRID,
    drawn_by_lot,
    labelled_grid,
    read_report,
    report_folder,
    write_report,
)
from gentron.train.scenes import nouns
from gentron.train.score import OTHER_PROMPT, noise, real, score_sets
from gentron.train.sweep import Cell, plan, run_sweep
from gentron.train.tables import (
    aligned,
    category_rows,
    guidance_rows,
    interval,
    markdown,
    score_rows,
    sweep_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROVENANCE = {"recipe": "a test", "autoencoder_images": 320, "denoiser_steps": 40, "seed": 0}
SETTINGS = {
    "bundle": "emoji", "digest": "d" * 64, "tensors": "t" * 64, "provenance": PROVENANCE,
    "solver": "euler", "steps": 20, "guidance": 4.0, "seed": 0, "sample": None,
}  # fmt: skip


def picture(name: str, row: int) -> np.ndarray:
    return np.full((128, 128, 3), row, np.uint8)


@pytest.fixture(scope="module")
def results(scorer, font_sprites):
    sets = {name: found[:8] for name, found in prompt_sets(nouns()).items()}
    truth = real(font_sprites, nouns(), 3)
    return score_sets(scorer, sets, lambda name: truth, {"real": truth, "noise": noise(0)})


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, SETTINGS, results, picture)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """As much of one as the card reads, in a training folder with its logs."""
    training = tmp_path / "training"
    training.mkdir()
    logs = {
        "autoencoder": [{"step": 10, "images_per_second": 4}, {"step": 20, "images_per_second": 8}],
        "denoiser": [{"step": 20, "seconds_per_step": 90}, {"step": 15, "seconds_per_step": 90},
                     {"step": 40, "seconds_per_step": 45}],
    }  # fmt: skip
    for name, rows in logs.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (training / f"{name}.jsonl").write_text(text)
    made = training / "checkpoint"
    made.mkdir()
    (made / "checkpoint.json").write_text(json.dumps({"provenance": PROVENANCE}))
    (made / "nouns.txt").write_text("cat\ndog\nowl\n")
    return made


def test_a_report_folder_is_complete(folder, results):
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [RANDOM_GRID, REPORT, REPORT_TEXT, WORST_GRID]
    )
    report = read_report(folder)
    assert report["settings"] == SETTINGS
    assert list(report["sets"]) == [result.name for result in results]
    for name, values in report["sets"].items():
        assert values["asked"] == len(values["pictures"]) == 8
        assert list(values["columns"]) == ["generated", "real", "noise", OTHER_PROMPT]
        assert all(0 <= share <= 1 for column in values["columns"].values()
                   for share in column.values())  # fmt: skip
        assert bool(values["categories"]) == (name in ("nouns", "colors", "unseen-colors"))
    sizes = report["sets"]["sizes"]["mean_sizes"]
    assert sizes["small"]["generated"] < 0.55
    assert sizes["huge"]["generated"] > 0.9
    for values in report["sets"]["pairs"]["pictures"]:
        assert values["seed"] == noise_seed(values["prompt"], 0)


def test_the_text_of_a_report_has_every_number_and_both_grids(folder):
    text, report = (folder / REPORT_TEXT).read_text("utf-8"), read_report(folder)
    for row in (*score_rows(report, intervals=True), *category_rows(report)):
        assert f"| {' | '.join(row)} |" in text
    for part in (RANDOM_GRID, WORST_GRID, "d" * 64, "euler", "denoiser_steps 40", "## Settings"):
        assert part in text
    assert "$" not in text


def test_the_grids_show_36_at_random_and_the_worst_20(folder, results):
    with Image.open(folder / RANDOM_GRID) as random, Image.open(folder / WORST_GRID) as worst:
        assert random.size == (6 * 132 + 4, 6 * 170 + 4)
        assert worst.size == (5 * 132 + 4, 4 * 170 + 4)
    lot = drawn_by_lot(results, 36, 0)
    assert len(set(lot)) == 36
    assert lot == drawn_by_lot(results, 36, 0) != drawn_by_lot(results, 36, 1)


def test_a_grid_puts_each_picture_in_its_place_and_marks_wrong_ones():
    pictures = [picture("", shade) for shade in (0, 100, 200)]
    grid = labelled_grid(pictures, [("a", True), ("b", False), ("c", True)], columns=2)
    assert grid.width == 2 * 132 + 4
    places = ((64, 64), (64 + 132, 64), (64, 64 + 170))
    assert [grid.getpixel(place)[0] for place in places] == [0, 100, 200]
    label = np.asarray(grid.crop((136, 132, 264, 170))).reshape(-1, 3)
    assert (label[:, 0].astype(int) - label[:, 1] > 100).any()  # red ink
    label = np.asarray(grid.crop((4, 132, 132, 170))).reshape(-1, 3)
    assert not (label[:, 0].astype(int) - label[:, 1] > 100).any()


def test_a_folder_without_a_report_says_how_to_make_one(tmp_path):
    with pytest.raises(RequestError, match="gentron-train score -m BUNDLE --report"):
        read_report(tmp_path)
    (tmp_path / REPORT).write_text('{"sets": {}}')
    with pytest.raises(RequestError, match="make it again"):
        read_report(tmp_path)


def test_a_report_that_cannot_be_a_folder_is_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --report"):
        report_folder(tmp_path / "file")
    assert report_folder(tmp_path / "a" / "b").is_dir()


def test_intervals_are_wilsons():
    # Worked examples of Wilson's score interval at 95 %.
    assert interval(0.5, 100) == "40 to 60 %"
    assert interval(0.0, 20) == "0 to 16 %"
    assert interval(1.0, 20) == "84 to 100 %"
    assert interval(0.216, 375) == "18 to 26 %"


def test_tables_line_up():
    rows = [["set", "of", "right"], ["nouns", "12", "3.0 %"]]
    assert aligned(rows) == "set    of  right\nnouns  12  3.0 %"
    assert markdown(rows).splitlines()[1] == "| --- | ---: | ---: |"


def test_a_sweep_covers_every_solver_step_count_and_guidance():
    cells = plan(["euler", "unipc"], Cell("euler", 20, 4.0))
    assert len(cells) == len(set(cells)) == 2 * 4 + 5
    assert {c.steps for c in cells if c.solver == "unipc"} == {8, 12, 20, 40}
    assert {c.guidance for c in cells if (c.solver, c.steps) == ("euler", 20)} == {1, 2, 3, 4, 6, 8}
    assert Cell("unipc", 25, 5.0) in plan(["unipc"], Cell("unipc", 25, 5.0))


@pytest.fixture
def swept(scorer, font_sprites):
    """Runs a sweep in which only unipc draws what it is asked for; counts what is drawn."""
    prompts = [Prompt("a cat", (("cat",),)), Prompt("a dog", (("dog",),))]
    drawn = []

    def run(folder, settings):
        def model(cell):
            drawn.append(cell)
            return real(font_sprites, nouns(), 3) if cell.solver == "unipc" else noise(0)

        cells = plan(["unipc", "euler"], Cell("unipc", 20, 4.0))
        return run_sweep(cells, prompts, scorer, model, settings, folder)

    return run, drawn


def test_a_sweep_says_which_solver_is_good_and_goes_on_after_a_stop(swept, tmp_path):
    run, drawn = swept
    settings = {**SETTINGS, "solver": "unipc", "sample": 2}
    found = run(tmp_path, settings)
    assert sweep_rows(found)[1] == ["unipc", *["100.0 %"] * 4]
    assert sweep_rows(found)[2] == ["euler", *["0.0 %"] * 4]
    assert [row[:2] for row in guidance_rows(found)[1:]] == [
        [scale, "100.0 %"] for scale in ("1", "2", "3", "4", "6", "8")
    ]
    text = (tmp_path / sweep.SWEEP_TEXT).read_text("utf-8")
    assert "| euler | 0.0 % | 0.0 % | 0.0 % | 0.0 % |" in text

    kept = json.loads((tmp_path / sweep.SWEEP).read_text("utf-8"))
    (tmp_path / sweep.SWEEP).write_text(json.dumps({**kept, "cells": kept["cells"][:5]}))
    drawn.clear()
    assert run(tmp_path, settings) == found
    assert len(drawn) == len(found["cells"]) - 5
    drawn.clear()
    run(tmp_path, {**settings, "seed": 1})  # nothing of another seed is taken over
    assert len(drawn) == len(found["cells"])


def test_what_walks_alike_is_drawn_once(scorer, font_sprites, tmp_path):
    prompts = [Prompt("a cat", (("cat",),))]
    cells = [Cell(name, 8, scale) for name in ("ddim", "euler", "unipc") for scale in (1.0, 4.0)]
    drawn = []

    def model(cell):
        drawn.append(cell)
        return real(font_sprites, nouns(), 3) if cell.guidance == 4 else noise(0)

    settings = {**SETTINGS, "solver": "euler", "sample": 1}
    found = run_sweep(cells, prompts, scorer, model, settings, tmp_path,
                      walk=lambda cell: (cell.solver == "unipc", cell.guidance))  # fmt: skip
    assert drawn == [*cells[:2], *cells[4:]]
    assert [cell["solver"] for cell in found["cells"]] == [cell.solver for cell in cells]
    assert [cell["object"] for cell in found["cells"]] == [0.0, 1.0] * 3


def test_a_card_without_a_report_says_so_and_says_how_to_get_one(checkpoint):
    assert write_card(checkpoint) == [checkpoint / "README.md"]
    text = (checkpoint / "README.md").read_text("utf-8")
    assert card.UNSCORED in text
    assert "3 nouns" in text
    assert "$" not in text


def test_a_card_holds_data_licences_recipe_scores_pictures_and_limits(checkpoint, folder):
    written = write_card(checkpoint, folder, hardware="a toaster")
    assert written == [checkpoint / "README.md", checkpoint / "pictures" / RANDOM_GRID]
    text, report = written[0].read_text("utf-8"), read_report(folder)
    for heading in ("Data", "How it was trained", "Scores", "Limits", "Licences"):
        assert f"\n## {heading}\n" in text
    facts = ("SIL Open Font License 1.1", "Noto Color Emoji", "all-MiniLM-L6-v2", "Apache-2.0",
             "`emoji` package", "a toaster", f"(pictures/{RANDOM_GRID})", "not picked")  # fmt: skip
    for fact in facts:
        assert fact in text
    for row in (*score_rows(report, intervals=True), *category_rows(report)):
        assert f"| {' | '.join(row)} |" in text
    assert card.UNSCORED not in text
    assert written[1].read_bytes() == (folder / RANDOM_GRID).read_bytes()


def test_a_card_shows_the_sweep_that_lies_beside_the_report(checkpoint, folder, tmp_path, swept):
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    run, _ = swept
    run(both, {**SETTINGS, "solver": "unipc", "sample": 2})
    write_card(checkpoint, both)
    text = (checkpoint / "README.md").read_text("utf-8")
    assert "| euler | 0.0 % | 0.0 % | 0.0 % | 0.0 % |" in text
    run(both, {**SETTINGS, "solver": "unipc", "sample": 2, "tensors": "u" * 64})
    with pytest.raises(RequestError, match="of other weights"):
        write_card(checkpoint, both)


def test_a_report_of_another_training_is_refused(checkpoint, folder):
    other = {"provenance": {**PROVENANCE, "denoiser_steps": 41}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(other))
    with pytest.raises(RequestError, match="denoiser_steps differ"):
        write_card(checkpoint, folder)
    assert not (checkpoint / "README.md").exists()


def test_a_bundle_and_an_empty_folder_are_refused(checkpoint, tmp_path):
    (checkpoint / "gentron.json").write_text("{}")
    with pytest.raises(RequestError, match="export that again"):
        write_card(checkpoint)
    with pytest.raises(RequestError, match="gentron-train emoji"):
        write_card(tmp_path)


def test_hours_come_from_the_logs(checkpoint, tmp_path):
    # Autoencoder: 16 pictures a step, 10 steps at 4/s and 10 at 8/s: 60 s. Denoiser: 20 steps of
    # 90 s; then a stop, after which 5 are repeated; then to 40 at 45 s: 2700 s.
    assert training_hours(checkpoint.parent, 320) == pytest.approx((60 + 2700) / 3600)
    assert training_hours(tmp_path, 320) is None
    assert "46 minutes" in training_text(
        PROVENANCE, training_hours(checkpoint.parent, 320), "a toaster"
    )
    assert "not recorded" in training_text(PROVENANCE, None, "a toaster")


def test_the_card_tells_of_runs_that_went_on():
    first = {"video_motion_free": 0.15, "video_clips": 8192}
    own = {"more_motion_free": 0.1, "more_steps": 1700, "more_clips": 2048, "more_image_batch": 32,
           "more_teacher": "video"}  # fmt: skip
    text = training_text(first | own, 1.0, "a toaster")
    assert "| clips in the pool | 8,192 |" in text
    assert "| `more`: steps on pictures and clips together | 1,700 |" in text
    assert "| `more`: pictures in a step that sees pictures | 32 |" in text
    assert "| `more`: run whose model taught pictures | video |" in text
    assert "`video`" not in text


def test_a_checkpoint_of_the_recipe_carries_an_unscored_card(tmp_path):
    from gentron.train.autoencoder import new_autoencoder
    from gentron.train.checkpoint import write_checkpoint

    pool = SimpleNamespace(mean=torch.zeros(8), std=torch.ones(8))
    text = SimpleNamespace(model=torch.nn.Linear(1, 1))
    write_checkpoint(
        tmp_path / "made", torch.nn.Linear(1, 1), new_autoencoder(), pool, text,
        provenance=PROVENANCE,
    )  # fmt: skip
    written = (tmp_path / "made" / "README.md").read_text("utf-8")
    assert f"{len(nouns())} nouns" in written
    assert card.UNSCORED in written
    assert "not recorded" in written  # no logs beside it
    assert [folder.name for folder in tmp_path.iterdir()] == ["made"]
