"""Languages by script: what must be noticed, and what code, formulas and translations must not set off."""

import pytest

from finetune.data.languages import count_units, cut_prose, describe_language_change, describe_mixture, name_language

CHINESE = "请你详细地解释一下，为什么天空看起来是蓝色的？"
ENGLISH = "Please explain in a few sentences why the sky looks blue to us."
CODE = """```python
for name in names:
    print(name)
```"""
BARE_CODE = """def add(first, second):
    total = first + second
    return total
numbers = [1, 2, 3]
print(sum(numbers))
for number in numbers:
    show(number)"""
FORMULA = r"\[ \frac{\partial loss}{\partial weight} = \sum prediction - \text{target and some more words here} \]"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (CHINESE, "Chinese"),
        (ENGLISH, "Latin"),
        ("Pourquoi le ciel est-il bleu ?", "Latin"),
        ("空はなぜ青いのですか。", "Japanese"),
        ("在日本，「の」是最常见的假名，几乎每一句话都会用到它。", "Chinese"),
        ("하늘은 왜 파란가요", "Korean"),
        ("Почему небо голубое", "Cyrillic"),
        ("用 Python 写一个函数，返回列表中最大的数。", "Chinese"),
        ("天空 sky 海洋 ocean water", "mixed"),
        ("1 + 1 = 2", "none"),
        ("", "none"),
    ],
)
def test_the_name_of_a_language(text, language):
    assert name_language(text) == language


def test_units_are_letters_or_words():
    assert count_units("你好 world, hello there") == {"Chinese": 2, "Latin": 3}
    assert count_units("これは本") == {"Japanese": 4}


@pytest.mark.parametrize(
    "text", [CODE, BARE_CODE, FORMULA, "see https://example.org/some/long/path", "`first = second`"]
)
def test_code_and_formulas_are_no_prose(text):
    assert sum(count_units(cut_prose(text)).values()) <= 1
    assert count_units(text)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (CHINESE, ENGLISH, "asked in Chinese, answered in Latin"),
        (ENGLISH, CHINESE, "asked in Latin, answered in Chinese"),
        (CHINESE, f"{ENGLISH}\n{CODE}", "asked in Chinese, answered in Latin"),
        (CHINESE, CHINESE, None),
        (ENGLISH, ENGLISH, None),
        (CHINESE, CODE, None),
        (CHINESE, BARE_CODE, None),
        (CHINESE, FORMULA, None),
        (CHINESE, "O(n log n)", None),  # too little to tell
        ("把这句话翻译成另一种语言：天空是蓝色的。", ENGLISH, None),
        ("Translate into Chinese: the sky is blue today.", CHINESE, None),
        ("2 + 2 = ?", CHINESE, None),
    ],
)
def test_an_answer_in_another_language(question, answer, expected):
    assert describe_language_change(question, answer) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (
            CHINESE,
            "天空是蓝色的，because short waves are scattered 所以我们看到 blue light from all sides of it 就是这样的",
            True,
        ),
        (CHINESE, "用 Python 的 print 函数就可以把结果显示在屏幕上，非常简单。", False),
        (CHINESE, f"下面的程序会打印所有的名字，一行一个：\n{CODE}", False),
        (CHINESE, f"下面的程序会把两个数加起来，并且返回它们的和：\n{BARE_CODE}", False),
        (
            "翻译：天空是蓝色的，所以很好看。",
            "天空是蓝色的 means that the sky is blue, and 很好看 means that it looks very nice",
            False,
        ),
        (ENGLISH, "Confucius (孔子) taught in the state of Lu.", False),
    ],
)
def test_an_answer_that_mixes_scripts(question, answer, expected):
    assert (describe_mixture(question, answer) is not None) is expected
