"""The page's own HTML: its head, numbers as tiles, the verdict; in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..visualization.report import part, tiles_html

HEADER = """<div class="intro"><h1>Fewer tokens, side by side</h1>
<p>AiluRus merges similar tokens after an early layer, and the later layers run on what is left. No weights change.
Set how many tokens are kept, and see what that saves and what it changes.</p></div>"""
EMPTY = '<p class="hint">Drop an image or a clip on the left, and press Compare.</p>'

# In Gradio's own colors, so that both of its modes are met.
STYLE = """
.gradio-container { width: 100%; max-width: 88rem !important; margin: auto; }
.html-container { padding: 0 !important; }
.intro h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; margin: 0 0 .2rem; }
.intro p { color: var(--body-text-color-subdued); margin: 0; max-width: 44rem; }
.hint { padding: 3rem 1rem; text-align: center; color: var(--body-text-color-subdued);
  border: 1px dashed var(--border-color-primary); border-radius: .75rem; }
.refused { color: #b42318 !important; border-color: currentcolor; overflow-wrap: anywhere; }
.dark .refused { color: #fda29b !important; }
.told p { margin: .2rem 0; }
.compared {
  --card: var(--block-background-fill); --ink: var(--body-text-color); --soft: var(--body-text-color-subdued);
  --line: var(--border-color-primary); --accent: #00599c; --on-accent: #fff;
  color: var(--ink);
  PARTS
}
.compared .tiles { margin: 0 0 .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.compared .tiles > div { padding: .7rem .8rem; }
.compared .tiles dd { font-size: 1.1rem; white-space: nowrap; }
.compared .panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.compared .legend { padding: 0 !important; margin: .6rem 0 0 !important; }
.compared li { list-style: none; margin: 0 !important; padding: 0; }
.compared figcaption small, .compared .soft { font-size: .875rem; }
@media (min-width: 48rem) { #settings { position: sticky; top: .5rem; align-self: flex-start; } }
"""


def head() -> str:
    """What goes into the page's head: style and script."""
    return f"<style>{STYLE.replace('PARTS', part('compared.css'))}</style><script>{part('compared.js')}</script>"


def summary_html(result: dict[str, Any], agree: str, told: Sequence[str], notes: Sequence[str]) -> str:
    """The numbers of a comparison, the verdict, and lines of what it was.

    Args:
        result: of `Pair.to_dict`.
        agree: what the agreement is the share of.
        told: the verdict.
        notes: such as the setting and the device.
    """
    plain, reduced = result["tokens"]
    tiles = [
        ("as fast", f"{result['speedup']:.2f}×"),
        ("tokens", f"{plain} → {reduced}"),
        ("off → on", f"{result['plain_ms']:.0f} → {result['reduced_ms']:.0f} ms"),
        (agree, f"{result['agreement']:.1%}"),
    ]
    verdict = "".join(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in told)
    soft = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes if note)
    return f'<div class="compared">{tiles_html(tiles)}<div class="told" role="status">{verdict}{soft}</div></div>'


def refused_html(words: str) -> str:
    """Why there is no result."""
    return f'<p class="hint refused">{escape(words)}</p>'
