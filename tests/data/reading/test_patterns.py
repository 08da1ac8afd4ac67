"""Names with brackets are names, `**` is any folder, and the check of a recipe sees what a run will read."""

import pytest

from finetune.check.data_section import check_data_section
from finetune.data.reading.data_folders import list_files
from finetune.data.reading.patterns import expand_pattern, has_signs
from finetune.errors import DataError
from finetune.recipe.sections import DataSection

ROW = '{"prompt": "Q", "completion": "A"}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in (
        "br[1]/a.jsonl",
        "br[1]/b.jsonl",
        "br1/c.jsonl",
        "deep/x/y/d.jsonl",
        "deep/e.jsonl",
        "f[2].jsonl",
        "f2.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ROW, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("br[1]", ["br[1]/a.jsonl", "br[1]/b.jsonl"]),
        ("br[1]/*.jsonl", ["br[1]/a.jsonl", "br[1]/b.jsonl"]),
        ("br[1]/a.jsonl", ["br[1]/a.jsonl"]),
        ("br[12]/*.jsonl", ["br1/c.jsonl"]),
        ("f[2].jsonl", ["f[2].jsonl"]),
        ("f[23].jsonl", ["f2.jsonl"]),
        ("deep/**/*.jsonl", ["deep/e.jsonl", "deep/x/y/d.jsonl"]),
        ("**/d.jsonl", ["deep/x/y/d.jsonl"]),
        ("deep/*/y/d.jsonl", ["deep/x/y/d.jsonl"]),
        ("b?1/c.jsonl", ["br1/c.jsonl"]),
    ],
)
def test_patterns(folder, pattern, found):
    """The check looked for a pattern in the last part only, and a run took the brackets of a folder for one."""
    assert [path.relative_to(folder).as_posix() for path in list_files(folder / pattern)] == found
    assert list(check_data_section(DataSection(train=(pattern,)), folder)) == []


@pytest.mark.parametrize("pattern", ["br[1]/*.csv", "none/**/*.jsonl", "f[9].jsonl", "br[1]/z.jsonl"])
def test_patterns_that_match_nothing(folder, pattern):
    (problem,) = check_data_section(DataSection(train=(pattern,)), folder)
    assert problem.startswith(f"data.train: {pattern} does not exist")
    if has_signs(folder / pattern):
        assert expand_pattern(folder / pattern)[1] == []
        with pytest.raises(DataError, match="matches no file"):
            list_files(folder / pattern)


@pytest.mark.parametrize("name", ["gb18030", "utf-16", "latin-1", "utf-8", "UTF8"])
def test_encodings_that_python_knows(folder, name):
    assert list(check_data_section(DataSection(train=("f2.jsonl",), encoding=name), folder)) == []


@pytest.mark.parametrize("name", ["gbk2", "", "base64", "utf-8\0"])
def test_other_encodings_are_refused(folder, name):
    (problem,) = check_data_section(DataSection(train=("f2.jsonl",), encoding=name), folder)
    assert problem.startswith(f"data.encoding: {name!r} is no encoding")
