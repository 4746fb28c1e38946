"""The page at `/` in Chromium, as a person uses it: pictures, videos, gallery, mistakes, keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from gentron.runtime.http_access import Access
from gentron.runtime.keys import Key, Keys, hash_of, new_key

EVIL = '<img src=x onerror="document.title=1"> <script>document.title=1</script> "a cat" & \'b\''
DONE = "#status:text-is('Done.')"
PLAYED = "async v => { await new Promise(r => setTimeout(r, 300)); return v.currentTime }"


def downloaded(tab: Any) -> Path:
    with tab.expect_download() as download:
        tab.click("#download")
    return Path(download.value.path())


def reload(tab: Any) -> None:
    tab.reload()
    tab.wait_for_selector("html[data-ready]", state="attached")


def facts(tab: Any) -> dict[str, str]:
    return dict(zip(tab.locator("dt").all_inner_texts(), tab.locator("dd").all_inner_texts(),
                    strict=True))  # fmt: skip


def test_a_picture_is_watched_while_it_is_drawn_and_made_again_bit_by_bit(visit, draw, site):
    tab = visit()
    site.delay = 0.15
    draw(tab, steps=6, negative="rats")
    tab.wait_for_selector("#frames img[alt='Not done yet: a cat']")
    assert tab.get_attribute("#scale", "aria-valuetext").endswith(" of 6")
    assert tab.get_attribute("#scale", "aria-valuemax") == "6"
    tab.wait_for_selector(DONE)
    site.delay = 0.0
    assert tab.get_attribute("#frames img", "alt") == "a cat"
    first, seed = downloaded(tab), facts(tab)["Seed"]
    with Image.open(first) as picture:
        written = json.loads(picture.text["gentron"])
    assert (str(written["seed"]), written["steps"], written["negative"]) == (seed, 6, "rats")
    tab.click("#again")
    tab.wait_for_selector("#made-title:text-is('Made here (2)')")
    tab.wait_for_selector(DONE)
    assert downloaded(tab).read_bytes() == first.read_bytes()
    assert facts(tab)["Seed"] == tab.input_value("[name=seed]") == seed


def test_cancelling_ends_the_work_within_a_step(visit, draw, site):
    tab = visit()
    site.delay = 0.1
    before = site.metric("gentron_requests_total", outcome="cancelled")
    draw(tab, steps=400)
    tab.wait_for_selector("#scale i.done:nth-child(2)", state="attached")
    tab.keyboard.press("Escape")
    at = site.metric("gentron_step_seconds_count")
    tab.wait_for_selector("#status:text-is('Cancelled.')")
    site.until(lambda: site.metric("gentron_requests_total", outcome="cancelled") == before + 1, 5)
    assert site.metric("gentron_step_seconds_count") - at <= 2
    assert tab.inner_text("#made-title") == "Nothing made here yet"
    assert tab.locator("#draw").is_visible()


def test_several_at_once_have_seeds_that_follow_and_no_digit_is_lost(visit, draw):
    tab = visit()
    draw(tab, n=3, seed=2**64 - 3, steps=2)
    tab.wait_for_selector("#status:has-text('Done: 3 pictures')")
    seeds = set(tab.locator("#gallery .seed").all_inner_texts())
    assert seeds == {f"seed {2**64 - k}" for k in (1, 2, 3)}


def test_the_gallery_survives_a_reload_and_what_is_removed_can_be_put_back(visit, draw):
    tab = visit()
    draw(tab, "a dog", steps=2, seed=5)
    tab.wait_for_selector(DONE)
    made = downloaded(tab).read_bytes()
    reload(tab)
    tab.click("#gallery button")
    assert tab.inner_text("#shown-prompt") == "a dog"
    assert downloaded(tab).read_bytes() == made
    tab.click("#remove")
    tab.wait_for_selector("#made-title:text-is('Nothing made here yet')")
    tab.click("#undo")
    reload(tab)
    tab.wait_for_selector("#made-title:text-is('Made here (1)')")


def test_where_the_browser_keeps_nothing_it_says_so_before_anything_is_lost(visit, draw):
    broken = "indexedDB.open = () => { throw new Error('not allowed here') }"
    tab = visit(script=broken)
    assert "keeps nothing (not allowed here)" in tab.inner_text("#kept")
    draw(tab, steps=1)
    tab.wait_for_selector(DONE)
    assert "1 of these are not kept" in tab.inner_text("#kept")
    with tab.expect_event("dialog") as asked:
        tab.close(run_before_unload=True)
    assert asked.value.type == "beforeunload"
    asked.value.accept()


def test_a_video_is_filmed_found_again_after_a_reload_and_plays(visit, draw, site):
    tab = visit()
    tab.check("[value=video]")
    assert tab.input_value("[name=frames]") == "8"
    site.delay = 0.5  # so that it is not done before the page is back
    draw(tab, "a red apple moving right", frames=8, fps=8, steps=40)
    tab.wait_for_selector("#scale i.done", state="attached")
    reload(tab)
    tab.wait_for_selector("#count:has-text(' of 40')")
    site.delay = 0.0
    tab.wait_for_selector(DONE)
    film = tab.locator("#frames video")
    assert film.evaluate(PLAYED) > 0
    assert facts(tab)["Frames"] == "8 at 8 a second"
    assert downloaded(tab).read_bytes()[4:8] == b"ftyp"


def test_what_people_and_servers_write_is_text(visit, draw):
    tab = visit()
    draw(tab, EVIL, steps=1)
    tab.wait_for_selector(DONE)
    reload(tab)
    tab.click("#gallery button")
    assert tab.inner_text("#shown-prompt") == EVIL
    assert tab.locator("#gallery .caption").text_content() == EVIL
    tab.route("**/generations", lambda route: route.fulfill(
        status=400, json={"error": {"message": EVIL, "param": None}}))  # fmt: skip
    draw(tab, "a cat")
    tab.wait_for_selector("#error:not(:empty)")
    assert tab.inner_text("#error") == EVIL
    assert tab.title() == "GenTron"
    assert tab.locator("img[src=x], main script").count() == 0


def test_mistakes_are_told_in_the_servers_words_at_the_field(visit, draw):
    tab = visit()
    draw(tab, steps=900)
    tab.wait_for_selector("#error:not(:empty)")
    assert tab.inner_text("#error") == "steps: at most 500 here, got 900"
    assert tab.get_attribute("[name=steps]", "aria-invalid") == "true"
    assert tab.evaluate("document.activeElement.name") == "steps"
    draw(tab, " ", steps=2)
    assert tab.inner_text("#error") == "Say first what there is to see."
    tab.context.set_offline(True)
    draw(tab)
    tab.wait_for_selector("#error:has-text('does not answer')")
    tab.context.set_offline(False)
    draw(tab)
    tab.wait_for_selector(DONE)
    assert tab.inner_text("#error") == ""


def test_a_server_with_keys_asks_for_one_and_forgets_it_with_the_tab(
    visit, draw, open_site, video_pipeline, tmp_path
):
    key = new_key()
    Keys({"ann": Key("ann", hash_of(key))}).write(tmp_path / "keys")
    with open_site(video_pipeline, Access(tmp_path / "keys")) as locked:
        tab = visit(locked.url)
        assert tab.locator("#key-form").is_visible()
        for given, found in (("gentron-wrong", False), (key, True)):
            tab.fill("#key", given)
            tab.press("#key", "Enter")
            if not found:
                tab.wait_for_selector("#key-error:text-is('this key is not known here')")
        tab.wait_for_selector("#model:not(:empty)")
        assert not tab.locator("#key-form").is_visible()
        draw(tab, steps=1)
        tab.wait_for_selector(DONE)
        assert key not in tab.evaluate("JSON.stringify(localStorage)")
        other = visit(locked.url)
        assert other.locator("#key-form").is_visible()
        tab.context.close()
        other.context.close()
