"""Texts of users in pictures: formulas, letters that no font has, and names that a legend would leave out."""

import warnings

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from finetune.files.pictures import labels
from finetune.files.pictures.labels import render_png, use_fonts, write_label

CIRCLE = "\u20dd"  # an enclosing circle: the font STIX has it, the usual one has not


@pytest.fixture
def install(monkeypatch):
    """Return a function that lets this machine have only these font files."""
    yield lambda *files: (
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(file) for file in files]),
        labels._find_chinese_font.cache_clear(),
    )
    labels._find_chinese_font.cache_clear()


def draw(label):
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=label)
    axes.set_xticks([0, 1], [label, label])
    legend = axes.legend()
    return render_png(figure), [text.get_text() for text in legend.get_texts()]


def test_letters_without_a_font_are_escaped_and_nothing_warns(install):
    """A sweep over Chinese values drew empty boxes and printed a warning for each letter."""
    install()
    with use_fonts():
        label = write_label("学 = 'a$^$'\n_\x1b\U0001f600")
        assert label == "\\u5b66 = 'a\\$^\\$'\n_\\x1b\U0001f600"  # the usual font has this face
        assert write_label("_x") == " _x" and write_label("\U0001f9ff") == "\\U0001f9ff"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert draw(write_label("_学$x^$"))[1] == [" _\\u5b66\\$x^\\$"]


def test_an_installed_font_gives_the_letters(install, monkeypatch, tmp_path):
    stix = font_manager.findfont("STIXGeneral")
    broken = tmp_path / "broken-stix.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(labels, "_CHINESE_FONTS", ("stix",))
    monkeypatch.setattr(labels, "_PROBE", CIRCLE)
    install(broken, stix)
    with use_fonts(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_label(CIRCLE) == CIRCLE
        with_circle = draw(write_label(f"a{CIRCLE}"))[0]
        assert with_circle != draw("a")[0]
    with pytest.warns(UserWarning, match="missing from font"):  # outside, the usual font is alone again
        draw(CIRCLE)
