"""Write texts of users into pictures: matplotlib reads formulas between dollars, and its own font has no Chinese letters."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from finetune.files.terminal import escape_controls

# Parts of the file names of fonts with Chinese letters, in small letters, the best known first.
_CHINESE_FONTS = (
    "notosanscjk",
    "notosanssc",
    "sourcehansans",
    "wqy-",
    "droidsansfallback",
    "pingfang",
    "hiragino sans gb",
    "stheiti",
    "msyh",
    "simhei",
    "arial unicode",
    "notoserifcjk",
    "uming",
)
_PROBE = "中文学习"  # letters that a font for Chinese has


@contextlib.contextmanager
def use_fonts() -> Iterator[None]:
    """Let the pictures of this block take letters that the usual font lacks from an installed Chinese font, if there is one."""
    extra = _find_chinese_font()
    with rc_context({} if extra is None else {"font.family": [*rcParams["font.family"], extra]}):
        yield


def write_label(text: str) -> str:
    """Return a text that matplotlib shows as it is; letters that no font has are written as `\\u4e2d`, and controls too.

    A label that begins with an underscore would be left out of a legend, so a space stands before it.
    """
    known = _list_letters()
    shown = "".join(
        letter if letter == "\n" or ord(letter) in known else _escape(letter) for letter in escape_controls(text)
    )
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def render_png(figure: Figure, dpi: int = 140) -> bytes:
    """Return a figure as a PNG image."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()


def _escape(letter: str) -> str:
    number = ord(letter)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _list_letters() -> frozenset[int]:
    """Return the code points that the fonts of a picture have."""
    extra = _find_chinese_font()
    families = [*rcParams["font.family"], *([] if extra is None else [extra])]
    return frozenset().union(
        *(_read_letters(str(font_manager.findfont(FontProperties(family=[family])))) for family in families)
    )


@functools.cache
def _read_letters(file: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(file).get_charmap())


@functools.cache
def _find_chinese_font() -> str | None:
    """Return the family of an installed font with Chinese letters; matplotlib's own list may be older than the font."""
    files = [Path(file) for file in font_manager.findSystemFonts()]
    for part in _CHINESE_FONTS:
        for file in sorted(file for file in files if part in file.name.lower()):
            with contextlib.suppress(OSError, RuntimeError):  # a file that is no font
                if _read_letters(str(file)).issuperset(map(ord, _PROBE)):
                    font_manager.fontManager.addfont(file)
                    return font_manager.get_font(str(file)).family_name
    return None
