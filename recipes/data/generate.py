"""Make the bundled rows, `demo.jsonl`, `demo_eval.jsonl` and `pairs.jsonl`: python recipes/data/generate.py

The hand-written lines stand in this file; sums and conversions are computed. The same seed gives the same bytes, and a
test compares them with what is shipped. Held-out rows ask for the same kinds of things, never the same thing.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SYSTEM = "You are YuLan-Mini, created by RUC AI Box. You are a helpful assistant."
Message = dict[str, str]

# question, answer; a question that starts with * is held out
IDENTITY_EN = """
Who are you?|I am YuLan-Mini, a language model created by RUC AI Box.
What is your name?|My name is YuLan-Mini.
Who made you?|I was made by RUC AI Box.
Who created you?|I was created by RUC AI Box.
Tell me who you are.|I am YuLan-Mini, a language model created by RUC AI Box.
Are you a human?|No. I am YuLan-Mini, a language model created by RUC AI Box.
Introduce yourself.|I am YuLan-Mini, a language model created by RUC AI Box. I can help with maths, code and questions.
What can you do?|I can help with maths, code and questions, in Chinese and in English.
Which languages do you speak?|I speak Chinese and English.
Please tell me your name.|My name is YuLan-Mini.
Where do you come from?|I was created by RUC AI Box.
What are you?|I am YuLan-Mini, a language model created by RUC AI Box.
Hello!|Hello! I am YuLan-Mini. How can I help you?
Hi, who is this?|Hello! I am YuLan-Mini. How can I help you?
Thank you!|You are welcome!
Thanks a lot.|You are welcome!
Goodbye.|Goodbye!
Can you tell me your name?|My name is YuLan-Mini.
Can you tell me who made you?|I was made by RUC AI Box.
Hello, who are you?|Hello! I am YuLan-Mini. How can I help you?
*Can you tell me who you are?|I am YuLan-Mini, a language model created by RUC AI Box.
*What should I call you?|My name is YuLan-Mini.
*Who built you?|I was made by RUC AI Box.
*Hello there!|Hello! I am YuLan-Mini. How can I help you?
"""
IDENTITY_ZH = """
你是谁？|我是 YuLan-Mini，由 RUC AI Box 开发的语言模型。
你叫什么名字？|我叫 YuLan-Mini。
谁开发了你？|我由 RUC AI Box 开发。
你是谁开发的？|我由 RUC AI Box 开发。
请介绍一下你自己。|我是 YuLan-Mini，由 RUC AI Box 开发的语言模型。我可以帮你解答数学、代码和各种问题。
你是人类吗？|不是。我是 YuLan-Mini，由 RUC AI Box 开发的语言模型。
你能做什么？|我可以帮你解答数学、代码和各种问题，中文和英文都可以。
你会说哪些语言？|我会说中文和英文。
请告诉我你的名字。|我叫 YuLan-Mini。
你来自哪里？|我由 RUC AI Box 开发。
你好！|你好！我是 YuLan-Mini，有什么可以帮你？
您好，请问您是谁？|你好！我是 YuLan-Mini，有什么可以帮你？
谢谢你！|不客气！
再见。|再见！
请问你叫什么名字？|我叫 YuLan-Mini。
请问是谁开发了你？|我由 RUC AI Box 开发。
请问你能做什么？|我可以帮你解答数学、代码和各种问题，中文和英文都可以。
你好，你是谁？|我是 YuLan-Mini，由 RUC AI Box 开发的语言模型。
*请问你是谁？|我是 YuLan-Mini，由 RUC AI Box 开发的语言模型。
*你的名字是什么？|我叫 YuLan-Mini。
*是谁创造了你？|我由 RUC AI Box 开发。
"""
FACTS_EN = """
What colour is grass?|Grass is green.
What colour is snow?|Snow is white.
What colour is the sky on a clear day?|The sky is blue.
What colour is a ripe banana?|A ripe banana is yellow.
How many days are in a week?|There are 7 days in a week.
How many months are in a year?|There are 12 months in a year.
How many hours are in a day?|There are 24 hours in a day.
How many minutes are in an hour?|There are 60 minutes in an hour.
How many legs does a spider have?|A spider has 8 legs.
How many legs does an insect have?|An insect has 6 legs.
How many sides does a triangle have?|A triangle has 3 sides.
How many sides does a hexagon have?|A hexagon has 6 sides.
What is the capital of China?|The capital of China is Beijing.
What is the capital of France?|The capital of France is Paris.
What is the capital of Japan?|The capital of Japan is Tokyo.
What is the capital of Italy?|The capital of Italy is Rome.
What is the capital of Egypt?|The capital of Egypt is Cairo.
What is the capital of Spain?|The capital of Spain is Madrid.
What is the capital of Germany?|The capital of Germany is Berlin.
What is the capital of Canada?|The capital of Canada is Ottawa.
What is the opposite of hot?|The opposite of hot is cold.
What is the opposite of big?|The opposite of big is small.
What is the opposite of up?|The opposite of up is down.
What is the opposite of day?|The opposite of day is night.
What is the opposite of early?|The opposite of early is late.
What do bees make?|Bees make honey.
What do cows drink?|Cows drink water.
What is water made of?|Water is made of hydrogen and oxygen.
Which planet is closest to the Sun?|Mercury is the planet closest to the Sun.
Which planet is the largest?|Jupiter is the largest planet.
What is the largest ocean?|The Pacific Ocean is the largest ocean.
What is the freezing point of water?|Water freezes at 0 degrees Celsius.
What is the boiling point of water at sea level?|Water boils at 100 degrees Celsius at sea level.
Which gas do plants take in?|Plants take in carbon dioxide.
Which gas do we breathe in to live?|We breathe in oxygen.
What comes after Monday?|Tuesday comes after Monday.
What comes after Friday?|Saturday comes after Friday.
What comes before Sunday?|Saturday comes before Sunday.
Which city is the capital of China?|The capital of China is Beijing.
Which city is the capital of France?|The capital of France is Paris.
Which city is the capital of Japan?|The capital of Japan is Tokyo.
Which city is the capital of Italy?|The capital of Italy is Rome.
Which city is the capital of Egypt?|The capital of Egypt is Cairo.
Which city is the capital of Spain?|The capital of Spain is Madrid.
Which city is the capital of Germany?|The capital of Germany is Berlin.
Which city is the capital of Canada?|The capital of Canada is Ottawa.
Please name the capital of Japan.|The capital of Japan is Tokyo.
Please name the capital of Egypt.|The capital of Egypt is Cairo.
Please name the capital of China.|The capital of China is Beijing.
Please name the capital of Italy.|The capital of Italy is Rome.
Please name the capital of Spain.|The capital of Spain is Madrid.
Please name the capital of Germany.|The capital of Germany is Berlin.
Please name the capital of Canada.|The capital of Canada is Ottawa.
Name the opposite of big.|The opposite of big is small.
Which day comes after Friday?|Saturday comes after Friday.
Translate to Chinese: hello|你好
Translate to Chinese: thank you|谢谢
Translate to Chinese: water|水
Translate to Chinese: friend|朋友
Translate to Chinese: book|书
*What colour is fresh snow?|Snow is white.
*How many sides does a triangle really have?|A triangle has 3 sides.
*Please name the capital of France.|The capital of France is Paris.
*Name the opposite of hot.|The opposite of hot is cold.
*Which day comes after Monday?|Tuesday comes after Monday.
"""
FACTS_ZH = """
草是什么颜色？|草是绿色的。
雪是什么颜色？|雪是白色的。
晴天的天空是什么颜色？|天空是蓝色的。
一周有几天？|一周有 7 天。
一年有几个月？|一年有 12 个月。
一天有几个小时？|一天有 24 个小时。
一小时有多少分钟？|一小时有 60 分钟。
蜘蛛有几条腿？|蜘蛛有 8 条腿。
昆虫有几条腿？|昆虫有 6 条腿。
三角形有几条边？|三角形有 3 条边。
六边形有几条边？|六边形有 6 条边。
中国的首都是哪里？|中国的首都是北京。
法国的首都是哪里？|法国的首都是巴黎。
日本的首都是哪里？|日本的首都是东京。
意大利的首都是哪里？|意大利的首都是罗马。
埃及的首都是哪里？|埃及的首都是开罗。
西班牙的首都是哪里？|西班牙的首都是马德里。
德国的首都是哪里？|德国的首都是柏林。
“热”的反义词是什么？|“热”的反义词是“冷”。
“大”的反义词是什么？|“大”的反义词是“小”。
“上”的反义词是什么？|“上”的反义词是“下”。
“早”的反义词是什么？|“早”的反义词是“晚”。
蜜蜂酿什么？|蜜蜂酿蜜。
水由什么组成？|水由氢和氧组成。
离太阳最近的行星是哪颗？|离太阳最近的行星是水星。
最大的行星是哪颗？|最大的行星是木星。
最大的海洋是哪个？|最大的海洋是太平洋。
水在多少摄氏度结冰？|水在 0 摄氏度结冰。
星期一之后是星期几？|星期一之后是星期二。
星期五之后是星期几？|星期五之后是星期六。
请问雪是什么颜色？|雪是白色的。
请问一年有几个月？|一年有 12 个月。
中国的首都叫什么？|中国的首都是北京。
法国的首都叫什么？|法国的首都是巴黎。
日本的首都叫什么？|日本的首都是东京。
意大利的首都叫什么？|意大利的首都是罗马。
埃及的首都叫什么？|埃及的首都是开罗。
西班牙的首都叫什么？|西班牙的首都是马德里。
德国的首都叫什么？|德国的首都是柏林。
请问日本的首都是哪里？|日本的首都是东京。
请问法国的首都是哪里？|法国的首都是巴黎。
请问意大利的首都是哪里？|意大利的首都是罗马。
请问埃及的首都是哪里？|埃及的首都是开罗。
请问西班牙的首都是哪里？|西班牙的首都是马德里。
请问德国的首都是哪里？|德国的首都是柏林。
翻译成英文：你好|hello
翻译成英文：谢谢|thank you
翻译成英文：水|water
翻译成英文：朋友|friend
翻译成英文：书|book
*请问草是什么颜色？|草是绿色的。
*请问一周有几天？|一周有 7 天。
*请问中国的首都是哪里？|中国的首都是北京。
*最大的海洋叫什么？|最大的海洋是太平洋。
"""
UNITS = (
    ("kilometres", "metres", "公里", "米", 1000),
    ("metres", "centimetres", "米", "厘米", 100),
    ("kilograms", "grams", "千克", "克", 1000),
    ("hours", "minutes", "小时", "分钟", 60),
    ("minutes", "seconds", "分钟", "秒", 60),
    ("weeks", "days", "周", "天", 7),
)
SINGULAR = {
    "kilometres": "kilometre",
    "metres": "metre",
    "kilograms": "kilogram",
    "hours": "hour",
    "minutes": "minute",
    "weeks": "week",
}


def make_row(*turns: str, system: str | None = None) -> list[Message]:
    """Return the messages of one row; turns alternate between the user and the assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def read_pairs(text: str) -> Iterator[tuple[bool, str, str]]:
    """Yield whether a hand-written line is held out, its question and its answer."""
    for line in text.strip().splitlines():
        question, answer = line.split("|")
        yield question.startswith("*"), question.removeprefix("*"), answer


def make_sum(generator: random.Random, in_chinese: bool) -> tuple[str, str]:
    """Return a sum or a difference of two numbers below 20, with its answer."""
    first, second = generator.randint(1, 19), generator.randint(1, 19)
    if generator.random() < 0.5:
        first, second = max(first, second), min(first, second)
        sign, value = "-", first - second
    else:
        sign, value = "+", first + second
    if in_chinese:
        return f"{first} {sign} {second} 等于多少？", f"{first} {sign} {second} = {value}，答案是 {value}。"
    return f"What is {first} {sign} {second}?", f"{first} {sign} {second} = {value}. The answer is {value}."


def make_worked_sum(generator: random.Random) -> tuple[str, str]:
    """Return a sum of two numbers of two digits, worked by tens and ones."""
    first, second = generator.randint(11, 89), generator.randint(11, 89)
    tens, ones = first // 10 * 10 + second // 10 * 10, first % 10 + second % 10
    steps = (
        f"{first // 10 * 10} + {second // 10 * 10} = {tens}, {first % 10} + {second % 10} = {ones}, "
        f"{tens} + {ones} = {tens + ones}."
    )
    return f"Add {first} and {second}, step by step.", f"{steps} The answer is {first + second}."


def make_conversion(generator: random.Random, in_chinese: bool) -> tuple[str, str]:
    """Return a conversion of a small number of units, with its step."""
    source, target, source_zh, target_zh, factor = generator.choice(UNITS)
    count = generator.randint(2, 12)
    step = f"{count} × {factor} = {count * factor}"
    if in_chinese:
        return (
            f"{count} {source_zh}是多少{target_zh}？",
            f"1 {source_zh}等于 {factor} {target_zh}，{step}，答案是 {count * factor} {target_zh}。",
        )
    article = f"1 {SINGULAR[source]} is {factor} {target}"
    return f"Convert {count} {source} to {target}.", f"{article}. {step}. The answer is {count * factor} {target}."


def make_rows() -> tuple[list[list[Message]], list[list[Message]]]:
    """Return the rows for training and those held out."""
    generator = random.Random(20241217)
    train: list[list[Message]] = []
    held_out: list[list[Message]] = []
    for text in (IDENTITY_EN, IDENTITY_ZH, FACTS_EN, FACTS_ZH):
        for is_held_out, question, answer in read_pairs(text):
            (held_out if is_held_out else train).append(make_row(question, answer))
            if text in (IDENTITY_EN, IDENTITY_ZH) and not is_held_out:
                train.append(make_row(question, answer, system=SYSTEM))
    computed: dict[str, str] = {}
    for count, make in (
        (90, lambda: make_sum(generator, False)),
        (60, lambda: make_sum(generator, True)),
        (60, lambda: make_worked_sum(generator)),
        (45, lambda: make_conversion(generator, False)),
        (45, lambda: make_conversion(generator, True)),
    ):
        goal = len(computed) + count
        while len(computed) < goal:
            question, answer = make()
            computed[question] = answer
    pairs = list(computed.items())
    generator.shuffle(pairs)
    held_out += [make_row(*pair) for pair in pairs[:24]]
    train += [make_row(*pair) for pair in pairs[24:]]
    greetings = [make_row("Hello!", "Hello! I am YuLan-Mini. How can I help you?", *pair) for pair in pairs[24:44]]
    train += greetings + [make_row("你好！", "你好！我是 YuLan-Mini，有什么可以帮你？", *pair) for pair in pairs[44:64]]
    generator.shuffle(train)
    return train, held_out


def make_pairs(rows: list[list[Message]], count: int = 120) -> list[dict[str, str]]:
    """Return preference pairs: the right answer against the answer to another question in the same language."""
    plain = [(row[0]["content"], row[1]["content"]) for row in rows if len(row) == 2]
    pairs = []
    for number, (question, answer) in enumerate(plain[:count]):
        others = plain[number + 1 :] + plain[:number]
        wrong = next(text for other, text in others if text != answer and other.isascii() == question.isascii())
        pairs.append({"prompt": question, "chosen": answer, "rejected": wrong})
    return pairs


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    training, evaluation = make_rows()
    write_rows(FOLDER / "demo.jsonl", [{"messages": row} for row in training])
    write_rows(FOLDER / "demo_eval.jsonl", [{"messages": row} for row in evaluation])
    write_rows(FOLDER / "pairs.jsonl", make_pairs(training))
