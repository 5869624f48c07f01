"""The browser harness: a good page has no fault, and each fault is caught. `test_zoo.py` shows it every report."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import opened

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
"""An image of one pixel."""
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #111 } }
body { color: var(--ink); background: var(--paper); max-width: 60rem }
.scroll { overflow-x: auto }
"""
GOOD = f"""
<h1 id="top">A page</h1><p>Words, and <a href="#top" style="color: inherit">a link</a>.</p>
<img src="{PIXEL}" alt="one pixel">
<div class="scroll"><table style="width: 3000px"><caption>Wide</caption><tr><td>1</td></tr></table></div>
<details><summary>more</summary><p>inside</p></details>
"""


def page(folder: Path, body: str, policy: str = POLICY) -> Path:
    path = folder / "page.html"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>t</title>'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>'
    )
    return path


def test_a_good_page_has_no_fault(chromium: Browser, tmp_path: Path) -> None:
    seen = opened(chromium, page(tmp_path, GOOD))
    assert seen.faults == ()
    assert (seen.pages, seen.images) == (1, 1)


BAD = {
    "console": ("<script>console.error('oh')</script>", "console: oh"),
    "script": ("<script>throw new Error('oh')</script>", "script: oh"),
    "policy": ("<script>1</script>", "policy: script-src-elem inline"),
    "request": ('<img src="http://127.0.0.1:9/a.png" alt="a">', "request: http://127.0.0.1:9/a.png"),
    "file": ('<link rel="stylesheet" href="other.css">', "request: file://"),
    "broken image": ('<img src="data:image/png;base64,AAAA" alt="a">', "phone, light: broken image: img"),
    "image without alt": (f'<img src="{PIXEL}">', "phone, light: image without alt: img"),
    "table without caption": (
        "<table><tr><td>1</td></tr></table>", 'desktop, dark: table without caption: table "1"',
    ),
    "link without target": ('<a href="#none">x</a>', "print: link without target: #none"),
    "wide on a phone": (
        '<div style="width: 600px">wide</div>', 'phone, light: wider than the window: div "wide"',
    ),
    "wide on paper": (
        '<style>@media print { #w { width: 1000px } }</style><div id="w">wide</div>',
        'print: wider than the window: div#w "wide"',
    ),
    "cut off": (
        '<div style="overflow-x: hidden"><p id="c" style="width: 2000px">cut</p></div>',
        'desktop, light: wider than the window: p#c "cut"',
    ),
    "in closed details": (
        '<details><summary>s</summary><p style="width: 2000px">d</p></details>',
        'desktop, light: wider than the window: p "d"',
    ),
    "pale": ('<p style="color: #999">pale</p>', 'desktop, light: low contrast: p "pale" 2.85'),
    "dark on dark": ('<p style="color: #222">dark</p>', 'phone, dark: low contrast: p "dark" 1.19'),
    "see-through": (
        '<div style="background: #000"><p style="background: rgb(255 255 255 / .5); color: #777">grey</p></div>',
        'desktop, light: low contrast: p "grey"',
    ),
}  # fmt: skip
"""The addition to a good page, and the beginning of the fault that is found."""
SCRIPTS = "script-src 'unsafe-inline'"
LAX = {"console": SCRIPTS, "script": SCRIPTS, "request": "img-src *; style-src 'unsafe-inline'",
       "file": "style-src * 'unsafe-inline' file:"}  # fmt: skip
"""Policies under which a fault can be seen at all."""


@pytest.mark.parametrize("fault", BAD)
def test_a_page_with_one_fault_is_caught(fault: str, chromium: Browser, tmp_path: Path) -> None:
    body, told = BAD[fault]
    seen = opened(chromium, page(tmp_path, f"{GOOD}{body}", LAX.get(fault, POLICY)))
    assert any(line.startswith(told) for line in seen.faults), seen.faults


def test_the_pages_of_a_print_are_counted(chromium: Browser, tmp_path: Path) -> None:
    seen = opened(chromium, page(tmp_path, "".join('<p style="break-after: page">p</p>' for _ in range(12))))
    assert seen.pages in (12, 13)
