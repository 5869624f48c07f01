"""A page as a reader meets it: opened in headless Chromium at two widths and two colour schemes, and printed.

Nothing is downloaded: Playwright drives the system's own Chromium. `opened` looks, `Seen.faults` says what is wrong.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WIDTHS = {"phone": (390, 844), "desktop": (1280, 800)}
SCHEMES = ("light", "dark")
CONTRAST = 4.5
"""Of text against what is behind it, at least: WCAG 2 AA. Large text needs 3."""
SHRINK = 1.25
"""A browser prints a page that is too wide smaller, all of it: more than this is a fault."""

LOOK = r"""
([contrast, slack]) => {
  const label = (e) => e.tagName.toLowerCase() + (e.id ? '#' + e.id : '') +
    ' ' + JSON.stringify((e.getAttribute('alt') || e.textContent || '').trim().slice(0, 40));
  const all = (what) => [...document.querySelectorAll(what)];
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const found = {};

  found['broken image'] = all('img').filter((e) => !e.complete || e.naturalWidth === 0).map(label);
  found['image without alt'] = all('img').filter((e) => !(e.getAttribute('alt') || '').trim()).map(label);
  found['table without caption'] = all('table').filter((e) => !e.caption || !e.caption.textContent.trim()).map(label);
  found['link without target'] = all('a[href^="#"]').filter((e) => {
    const name = decodeURIComponent(e.getAttribute('href').slice(1));
    return name && !document.getElementById(name);
  }).map((e) => e.getAttribute('href'));

  const root = document.scrollingElement, width = root.clientWidth * slack;
  const scrolls = (e) => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  const held = (e) => e.parentElement && e.parentElement !== root && e.parentElement !== document.body &&
    (scrolls(e.parentElement) || held(e.parentElement));
  const wide = all('body *').filter((e) => shown(e) && e.getBoundingClientRect().right > width + 1 && !held(e));
  found['wider than the window'] = wide.filter((e) => !wide.includes(e.parentElement)).map(label);
  if (root.scrollWidth > width) found['wider than the window'].push(`the page: ${root.scrollWidth} > ${width}`);

  const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {  // whatever way of writing a colour, as 0..1 numbers
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = '#000'; pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * under[i]).concat(1);
  const behind = (e) => {
    if (!e) return matchMedia('(prefers-color-scheme: dark)').matches &&
      getComputedStyle(document.documentElement).colorScheme.includes('dark') ? [0.07, 0.07, 0.07, 1] : [1, 1, 1, 1];
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(e.parentElement));
  };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) =>
    sum + w * (c[i] <= 0.04045 ? c[i] / 12.92 : ((c[i] + 0.055) / 1.055) ** 2.4), 0);
  found['low contrast'] = all('body, body *').filter((e) => shown(e) &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).flatMap((e) => {
      const style = getComputedStyle(e), back = behind(e);
      const pair = [light(over(rgba(style.color), back)), light(back)].sort((a, b) => b - a);
      const ratio = (pair[0] + 0.05) / (pair[1] + 0.05), size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
      return ratio < (large ? 3 : contrast) ? [`${label(e)} ${ratio.toFixed(2)}`] : [];
    });
  return found;
}
"""
WATCH = """
addEventListener('securitypolicyviolation', (e) => {
  (window.violations ||= []).push(`${e.violatedDirective} ${e.blockedURI} ${e.sourceFile || ''}`);
});
"""
OPEN = "for (const e of document.querySelectorAll('details')) e.open = true"

SETTLE = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Two frames: what observes its own size, as a chart does, has then drawn itself anew for the view."""


@dataclass(frozen=True)
class Seen:
    """What a page looked like.

    Arguments:
        faults: what is wrong, each line with the view it was seen in; none for a good page.
        pages: of the PDF that it prints to (A4).
        images: how many images it shows.
    """

    faults: tuple[str, ...]
    pages: int
    images: int


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless; one is enough for all tests."""
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


def opened(running: Browser, path: Path) -> Seen:
    """Load a local page in every view, and print it.

    Arguments:
        running: of `browser`.
        path: of an HTML file.
    """
    faults: list[str] = []
    context = running.new_context()
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        page.on("console", lambda told: faults.append(f"console: {told.text}") if told.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("request", lambda asked: faults.extend(_strange(asked.url, path)))
        page.goto(path.resolve().as_uri(), wait_until="load")
        page.evaluate(OPEN)
        for name, (width, height) in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme, media="screen")  # type: ignore[arg-type]
                faults += _faults(page, f"{name}, {scheme}")
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins, at 96 dpi
        page.emulate_media(color_scheme="light", media="print")
        faults += _faults(page, "print")
        faults += [f"policy: {line}" for line in page.evaluate("window.violations || []")]
        printed = page.pdf(format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "10mm"))  # type: ignore[arg-type]
        return Seen(tuple(dict.fromkeys(faults)), _pages(printed), page.locator("img").count())
    finally:
        context.close()


def _faults(page: Page, view: str) -> list[str]:
    page.evaluate(SETTLE)
    found: dict[str, Any] = page.evaluate(LOOK, [CONTRAST, SHRINK if view == "print" else 1])
    return [f"{view}: {what}: {where}" for what, places in found.items() for where in places]


def _strange(url: str, path: Path) -> list[str]:
    """A request for anything but the page itself and what it carries."""
    ours = url.startswith("data:") or url.partition("#")[0] == path.resolve().as_uri()
    return [] if ours else [f"request: {url[:200]}"]


def _pages(pdf: bytes) -> int:
    """Pages of a PDF of Chromium, whose page tree is not compressed."""
    return len(re.findall(rb"/Type\s*/Page\b", pdf))
