"""The page in headless Chromium, on a phone and on a desk: three turns by the keyboard, figures, labels and contrast."""
# playwright==1.61.0
import os
import pathlib
import shutil
import sys

from playwright.sync_api import expect, sync_playwright

chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not chromium:
    print("SKIPPED: there is no chromium (Debian: apt install chromium)")
    sys.exit()
shots = pathlib.Path(os.environ["ROOT"], "target", "clients", "screenshots")
shots.mkdir(parents=True, exist_ok=True)

# Relative luminance and contrast as WCAG 2 has them, of every text that can be seen.
CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const faults = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.offsetParent || e.disabled || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(e.outerHTML.slice(0, 100));
  }
  return faults;
}"""
LABELS = """() => [...document.querySelectorAll("input, textarea, button")].filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map((e) => e.outerHTML)"""

with sync_playwright() as browsers:
    browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for width, height, scheme in [(360, 740, "light"), (1280, 800, "dark")]:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(os.environ["BASE"] + "/")
        # The server asks for its key.
        page.get_by_label("The server's key").fill(os.environ["KEY"])
        page.get_by_label("The server's key").press("Tab")
        expect(page.locator("#model")).to_have_text("tiny")
        question = page.get_by_label("Your message", exact=False)
        for turn in range(3):
            question.focus()
            page.keyboard.type(f"Question: Ana has {turn + 2} coins. Ben gives Ana 7 more.")
            page.keyboard.press("Enter")
            expect(page.locator("#turns li")).to_have_count(2 * turn + 2)
            expect(page.locator("#send")).to_be_enabled(timeout=120_000)
        expect(page.locator("#reserved")).to_contain_text(" of ")
        answers = page.locator("#turns li.assistant").all_inner_texts()
        assert len(answers) == 3 and all(answer.removeprefix("Model").strip() for answer in answers), answers
        assert page.locator(".fault").count() == 0
        # Tab reaches every control in order.
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert {"question", "send", "clear", "turns"} <= reached, reached
        assert page.evaluate(CONTRAST) == [] and page.evaluate(LABELS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert page.evaluate("document.documentElement.lang") == "en" and page.title()
        assert all(url.startswith(os.environ["BASE"]) or url.startswith("data:") for url in asked), asked
        assert not errors, errors
        page.screenshot(path=shots / f"{width}.png")
        page.close()
    browser.close()
print(f"screenshots: {shots}")
