"""The page in a real browser, without a network: what a reader clicks, hovers, types and taps."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from report_samples import HOSTILE, sample

from isomoe.parity.report import write_page
from isomoe.parity.run import Prompt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
DESKTOP, PHONE = (1280, 900), (360, 740)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "page.html"
    report = sample()
    asked = (Prompt((1,), HOSTILE, "maths"), *report.baseline.prompts[1:])
    baseline = replace(report.baseline, prompts=asked)
    write_page(replace(report, baseline=baseline), path, decode=decode)
    return path.as_uri()


def decode(token: int) -> str:
    return HOSTILE if token == 77 else f" t{token}"


@pytest.fixture(params=[(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    """The page; the test fails if it logs anything, or asks for anything but its own file."""
    (width, height), scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        has_touch=width == PHONE[0],
        offline=True,
    )
    context.set_default_timeout(5000)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


def far(page: Page) -> Locator:
    """The table of prompts of the target that differs, which stands open."""
    return page.locator("table.prompts[data-row='2']")


def opened(page: Page, prompt: int) -> Locator:
    far(page).get_by_role("button", name=f"prompt {prompt}", exact=True).click()
    return far(page).locator("tr.detail")


def test_nothing_is_wider_than_the_screen(page: Page) -> None:
    opened(page, 3)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]
    for box in (far(page).locator(".inside"), page.locator("figure svg").first):
        bounds = box.bounding_box()
        assert bounds is not None
        assert bounds["x"] >= 0
        assert bounds["x"] + bounds["width"] <= page.viewport_size["width"]


def test_a_column_sorts_both_ways(page: Page) -> None:
    def order() -> list[str]:
        return far(page).locator("tbody > tr > th").all_inner_texts()

    def sizes() -> list[float]:
        cells = far(page).locator("tbody > tr > td:nth-child(6)")
        return [float(text) for text in cells.all_inner_texts()]

    assert order() == [str(number) for number in range(1, 7)]
    far(page).get_by_role("button", name="max |Δ|").click()
    assert sizes() == sorted(sizes(), reverse=True)
    expect(far(page).locator("th[aria-sort]")).to_have_attribute("aria-sort", "descending")
    far(page).get_by_role("button", name="max |Δ|").click()
    assert sizes() == sorted(sizes())
    far(page).get_by_role("button", name="kind").click()
    kinds = far(page).locator("tbody > tr > td:nth-child(2)").all_inner_texts()
    assert kinds == sorted(kinds)


def test_a_prompt_opens_moves_with_its_row_and_closes(page: Page) -> None:
    detail = opened(page, 3)
    expect(detail).to_contain_text("Prompt 2")
    expect(detail.locator(".toks .tok")).to_have_count(28)
    far(page).get_by_role("button", name="prompt", exact=True).click()
    rows = far(page).locator("tbody > tr")
    assert rows.nth(3).locator("th").inner_text() == "3"
    expect(rows.nth(4)).to_have_class("detail")
    far(page).get_by_role("button", name="prompt 3", exact=True).click()
    expect(detail).to_have_count(0)


def test_pointing_at_a_token_shows_the_candidates_of_both_sides(page: Page) -> None:
    detail = opened(page, 1)
    token = detail.locator(".toks .tok").nth(4)
    token.hover()
    panel = detail.locator(".seen")
    expect(panel).to_contain_text("token 5 of 30")
    text = token.inner_text()
    chosen = panel.locator("tr.chosen")
    expect(chosen).to_contain_text(text)
    baseline, target = (
        float(cell.replace("\u2212", "-")) for cell in chosen.locator("td").all_inner_texts()
    )
    shown = sample().rows[2].comparison.prompts[0].forced
    assert shown is not None
    assert target - baseline == pytest.approx(shown[4].delta, abs=2e-4)
    assert panel.locator("tbody tr").count() >= 4


def test_the_keyboard_reaches_every_token(page: Page) -> None:
    detail = opened(page, 1)
    detail.locator(".toks .tok").first.focus()
    panel = detail.locator(".seen")
    expect(panel).to_contain_text("token 1 of 30")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(panel).to_contain_text("token 3 of 30")
    page.keyboard.press("End")
    expect(panel).to_contain_text("token 30 of 30")
    assert detail.locator(".toks [tabindex='0']").count() == 1


def test_a_first_difference_is_marked_and_hostile_text_is_inert(page: Page) -> None:
    detail = opened(page, 3)
    part = detail.locator(".toks .tok.part")
    expect(part).to_have_count(1)
    part.click()
    panel = detail.locator(".seen")
    expect(panel).to_contain_text("First difference: the target\u2019s own decode goes on with")
    expect(panel).to_contain_text(HOSTILE.replace(" ", "·"))
    expect(opened(page, 1).first).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() != "owned"


@pytest.mark.parametrize(
    "page", [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light")], indirect=True, ids=str
)
def test_colours_have_contrast(page: Page) -> None:
    """WCAG AA: 4.5 to 1 for text, wherever it stands."""
    detail = opened(page, 1)
    detail.locator(".toks .tok").nth(2).hover()
    worst = page.evaluate(CONTRAST)
    assert worst["ratio"] >= 4.5, worst


CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, at) => sum + x * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const found = rgb(getComputedStyle(one).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  let worst = { ratio: 21 };
  let seen = 0;
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !one.checkVisibility() || one.closest("script")) continue;
    const style = getComputedStyle(one);
    const text = rgb(one.closest("svg") ? style.fill : style.color);
    const [high, low] = [light(text), light(behind(one))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    seen += 1;
    if (ratio < worst.ratio) worst = { ratio, text: one.textContent, of: one.className };
  }
  return seen > 100 ? worst : { ratio: 0, text: "nothing was looked at" };
}"""
