"""The page at `/` by keyboard, by screen reader, on a phone, in light and dark."""

from __future__ import annotations

import itertools

import pytest

DONE = "#status:text-is('Done.')"
FOCUS = """() => { const e = document.activeElement, s = getComputedStyle(e)
  const shown = e.type === 'radio' ? getComputedStyle(e.nextElementSibling) : s
  return [e.id || e.name || e.href || e.textContent.slice(0, 20), parseFloat(shown.outlineWidth) > 1
    && shown.outlineStyle !== 'none' || shown.boxShadow !== 'none'] }"""
# Every text with its colour and the first ground below it that is not transparent.
CONTRAST = r"""() => {
  const light = colour => colour.match(/[\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0)
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor
      if (!/(, 0\)|transparent)/.test(colour)) return colour
    }
  }
  const found = []
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    if (!(own || e.value) || !e.checkVisibility() || e.closest('.unseen, .skip')) continue
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))]
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (ratio < 4.5) found.push([e.id || e.className || e.tagName, ratio])
  }
  return found
}"""


def test_everything_can_be_done_from_the_keyboard_and_the_focus_is_seen(visit, draw):
    tab = visit(reduced_motion="reduce")
    tab.keyboard.press("Tab")
    seen = [tab.evaluate(FOCUS)]
    while seen[-1][0] != "prompt":
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate(FOCUS))
    tab.keyboard.type("a cat")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(DONE)
    while seen[-1][0] != "remove":
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate(FOCUS))
        assert len(seen) < 40, seen
    names = [name for name, _ in seen]
    assert {"theme", "draw", "negative", "width", "height", "steps", "solver", "guidance", "n",
            "seed", "defaults", "again", "download"} <= set(names)  # fmt: skip
    assert not [name for name, visible in seen if not visible]
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")  # again with this seed
    tab.wait_for_selector("#made-title:text-is('Made here (2)')")
    assert tab.evaluate("document.activeElement.id") in ("cancel", "draw")


def test_a_screen_reader_is_told_what_everything_is(visit, draw):
    tab = visit()
    draw(tab, steps=1)
    tab.wait_for_selector(DONE)
    tree = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored")
    ]
    roles = [role for role, _ in nodes]
    assert [roles.count(role) for role in ("main", "banner", "progressbar")] == [1, 1, 1]
    assert {"status", "alert", "form"} <= set(roles)
    asked = ("button", "link", "textbox", "spinbutton", "combobox", "radio", "progressbar", "image",
             "form", "region", "list")  # fmt: skip
    unnamed = [role for role, name in nodes if role in asked[:-1] and not name.strip()]
    assert not unnamed
    levels = tab.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].filter(h => h.checkVisibility())"
        ".map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(visit, draw, scheme):
    tab = visit(color_scheme=scheme)
    draw(tab, steps=900)
    tab.wait_for_selector("#error:not(:empty)")
    assert tab.evaluate(CONTRAST) == []
    draw(tab, steps=1)
    tab.wait_for_selector(DONE)
    assert tab.evaluate(CONTRAST) == []
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    tab.click("#theme" if scheme == "light" else "#prompt")  # system, light, dark
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != ground


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, draw, width):
    tab = visit(viewport={"width": width, "height": 700}, is_mobile=True, has_touch=True)
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert tab.evaluate(wide) <= 0
    tab.click("summary")
    tab.check("[value=video]")
    assert tab.evaluate(wide) <= 0
    tab.check("[value=picture]")
    draw(tab, "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamter", steps=1)
    tab.wait_for_selector(DONE)
    assert tab.evaluate(wide) <= 0
    small = tab.evaluate(
        "[...document.querySelectorAll('button, .button')].filter(b => b.checkVisibility())"
        ".filter(b => b.getBoundingClientRect().height < 24).map(b => b.id)"
    )
    assert not small
