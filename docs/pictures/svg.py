"""What all pictures share: colours for light and dark, text that keeps its width whatever font is there."""

from __future__ import annotations

from xml.sax.saxutils import escape

MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
SANS = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', 'Liberation Sans', Arial, sans-serif"

_LIGHT = {
    "paper": "#ffffff", "panel": "#f6f8fa", "edge": "#c4ccd5", "text": "#1f2328", "dim": "#59636e", "green": "#176f2c",
    "yellow": "#7d4e00", "red": "#c21c24", "cyan": "#0a6a8a", "blue": "#0757bd", "magenta": "#8b2fa8",
}  # fmt: skip
_DARK = {
    "paper": "#0d1117", "panel": "#161b22", "edge": "#454d57", "text": "#e6edf3", "dim": "#9aa5b1", "green": "#56d364",
    "yellow": "#e3b341", "red": "#ff7b72", "cyan": "#56d4dd", "blue": "#79b8ff", "magenta": "#d8a6ff",
}  # fmt: skip


def _rules(colours: dict[str, str]) -> str:
    rules = [f".{name}{{fill:{value}}}" for name, value in colours.items()]
    rules += [f".s-{name}{{stroke:{value}}}" for name, value in colours.items()]
    return "".join(rules)


def document(width: int, height: int, title: str, about: str, style: str, body: list[str]) -> str:
    """A whole SVG file. ``title`` and ``about`` are what a screen reader says."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        ' aria-labelledby="title about">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="about">{escape(about)}</desc>',
        f"<style>{_rules(_LIGHT)}@media (prefers-color-scheme:dark){{{_rules(_DARK)}}}{style}</style>",
        f'<rect class="paper s-edge" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip


def number(value: float) -> str:
    """Without a fraction that nobody sees."""
    return f"{value:.1f}".removesuffix(".0")
