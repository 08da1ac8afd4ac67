"""Make a small bilingual corpus to pre-train on, one file for each category: python recipes/data/corpus.py FOLDER [SEED]

Everything is drawn from the lines in this file; the same seed gives the same bytes, another seed other texts of the same kinds.
The files are named like the categories of `finetune mixtures`, so that a recipe mixes them in the proportions of a published phase.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

# Bytes of each file: as much as any published phase can take of it, where all take as much of the web.
SIZES: Mapping[str, int] = {
    "web": 360_000,
    "code": 200_000,
    "mathematics": 90_000,
    "chinese": 100_000,
    "instruction": 90_000,
}
# Rows to evaluate on. No instruction: the stable phases hardly see any, and a loss on it would show the change of the data
# where it should show how well the rest was learnt.
HELD_OUT_ROWS: Mapping[str, int] = {"web": 30, "code": 30, "mathematics": 16, "chinese": 16}
HELD_OUT_SEED = 20241217

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Lan", "Min", "Nora", "Omar", "Pia", "Wei"]
PLACES = ["market", "library", "harbour", "garden", "school", "station", "bakery", "museum", "farm", "park"]
ANIMALS = ["cat", "dog", "horse", "goose", "sheep", "fox", "bird", "goat"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"]
THINGS = ["basket", "book", "lamp", "coat", "map", "bicycle", "letter", "drum", "kettle", "ladder"]
FOODS = ["apples", "pears", "eggs", "rolls", "plums", "nuts", "carrots", "onions"]
WEATHERS = ["rain", "snow", "wind", "fog", "sunshine", "a storm"]
TIMES = ["In the morning", "At noon", "In the evening", "On Monday", "On Friday", "After the holidays", "Last winter"]
FEELINGS = ["tired", "happy", "hungry", "curious", "careful", "late"]
SUBJECTS = ["water", "iron", "bread", "paper", "glass", "salt", "wool", "honey"]
ORIGINS = {
    "water": "the hills",
    "iron": "ore in the ground",
    "bread": "flour and water",
    "paper": "the wood of trees",
    "glass": "sand that was melted",
    "salt": "the sea",
    "wool": "sheep",
    "honey": "the work of bees",
}
STORY = [
    "{time} {name} went to the {place} with a {colour} {thing}.",
    "There was {weather} all day, and {name} felt {feeling}.",
    "A {animal} sat beside the {place} and looked at the {colour} {thing}.",
    "{name} bought {count} {food} and gave {few} of them to {friend}.",
    '"Is this your {thing}?" asked {friend}. "Yes, it is mine," said {name}.',
    "The {animal} followed {name} from the {place} to the {second}.",
    "{friend} had lost a {thing} there, but nobody had seen it.",
    "When {name} came home, the {colour} {thing} stood by the door.",
]
ARTICLE = [
    "Most {subject} in this town comes from {origin}.",
    "The {place} opens at {hour} and closes at {later}.",
    "People bring {food} to the {place} and take {subject} home.",
    "In {year} the old {place} was built again beside the {second}.",
    "Visitors who like {food} should see the {place} first, then the {second}.",
    "It takes {count} minutes to walk from the {place} to the {second}.",
    "{subject_start} is sold by weight, {food} by number.",
    "When there is {weather}, the {place} stays closed until {hour}.",
]
NAMES_ZH = ["小明", "小红", "小兰", "小李", "小王", "小美"]
PLACES_ZH = ["市场", "学校", "公园", "图书馆", "车站", "花园"]
ANIMALS_ZH = ["猫", "狗", "马", "羊", "鸟", "牛"]
FOODS_ZH = ["苹果", "鸡蛋", "面包", "水果", "花生"]
WEATHERS_ZH = ["下雨", "下雪", "刮风", "晴天", "多云"]
STORY_ZH = [
    "今天{name}去了{place}，买了{count}个{food}。",
    "{place}的旁边有一只{animal}，{name}很喜欢它。",
    "昨天是{weather}，{name}和{friend}没有去{place}。",
    "{friend}问：“你有几个{food}？”{name}说：“我有{count}个{food}。”",
    "从{place}到{second}要走{count}分钟。",
    "{name}送给{friend}{few}个{food}，自己还有{rest}个。",
    "{second}的{animal}比{place}的{animal}大。",
]
Generator = random.Random


def write_story(draw: Generator) -> str:
    """Return a short text in English about one person, or one place."""
    place, second = draw.sample(PLACES, 2)
    name, friend = draw.sample(NAMES, 2)
    subject = draw.choice(SUBJECTS)
    count, hour = draw.randint(3, 12), draw.randint(6, 11)
    words = {
        "place": place,
        "second": second,
        "name": name,
        "friend": friend,
        "count": count,
        "few": draw.randint(1, count - 1),
        "hour": hour,
        "later": hour + draw.randint(2, 10),
        "year": draw.randint(1850, 1999),
        "subject": subject,
        "subject_start": subject.capitalize(),
        "origin": ORIGINS[subject],
        "time": draw.choice(TIMES),
        "colour": draw.choice(COLOURS),
        "thing": draw.choice(THINGS),
        "animal": draw.choice(ANIMALS),
        "food": draw.choice(FOODS),
        "weather": draw.choice(WEATHERS),
        "feeling": draw.choice(FEELINGS),
    }
    lines = draw.choice([STORY, ARTICLE])
    return " ".join(line.format(**words) for line in draw.sample(lines, draw.randint(4, 7)))


def write_chinese(draw: Generator) -> str:
    """Return a short text in Chinese."""
    place, second = draw.sample(PLACES_ZH, 2)
    name, friend = draw.sample(NAMES_ZH, 2)
    few, rest = draw.randint(1, 6), draw.randint(1, 6)
    words = {
        "place": place,
        "second": second,
        "name": name,
        "friend": friend,
        "count": few + rest,
        "few": few,
        "rest": rest,
        "animal": draw.choice(ANIMALS_ZH),
        "food": draw.choice(FOODS_ZH),
        "weather": draw.choice(WEATHERS_ZH),
    }
    return "".join(line.format(**words) for line in draw.sample(STORY_ZH, draw.randint(3, 5)))


def write_problem(draw: Generator) -> str:
    """Return a few worked sums, or a sum told as a story with its steps."""
    first, second, factor = draw.randint(2, 30), draw.randint(2, 30), draw.randint(2, 9)
    if draw.random() < 0.4:
        start, step = draw.randint(1, 20), draw.randint(2, 9)
        row = [start + step * place for place in range(6)]
        return f"The row {', '.join(map(str, row[:5]))} goes up by {step}. The next number is {row[4]} + {step} = {row[5]}."
    name, food = draw.choice(NAMES), draw.choice(FOODS)
    total = first + second
    return (
        f"{name} has {first} {food} and gets {second} more. {first} + {second} = {total}, so {name} has {total} {food}. "
        f"{factor} baskets of {first} {food} hold {factor} × {first} = {factor * first} {food}. "
        f"Half of {2 * second} is {second}, because {second} + {second} = {2 * second}."
    )


def write_code(draw: Generator) -> str:
    """Return a small Python function with a call and what the call gives."""
    name, argument = draw.choice(THINGS), draw.choice(["number", "value", "count", "size"])
    step, given = draw.randint(2, 12), draw.randint(1, 20)
    numbers = [draw.randint(1, 20) for _ in range(4)]
    return draw.choice(
        [
            f"def add_{name}({argument}):\n    return {argument} + {step}\n\n\nprint(add_{name}({given}))  # {given + step}\n",
            f"def scale_{name}({argument}):\n    return {argument} * {step}\n\n\nprint(scale_{name}({given}))  # {given * step}\n",
            f"def list_{name}({argument}):\n    return [{argument} + place for place in range(3)]\n\n\n"
            f"print(list_{name}({given}))  # {[given + place for place in range(3)]}\n",
            f"{name}s = {numbers}\nfor {name} in {name}s:\n    if {name} > {step}:\n        print({name})\n"
            f"# {' '.join(str(number) for number in numbers if number > step) or 'nothing'}\n",
            f"{name}s = {numbers}\nlargest = max({name}s)\nprint(largest, len({name}s))  # {max(numbers)} {len(numbers)}\n",
        ]
    )


def write_answer(draw: Generator) -> str:
    """Return a question with its answer, in English or in Chinese."""
    first, second = draw.randint(2, 30), draw.randint(2, 30)
    name, food, subject = draw.choice(NAMES), draw.choice(FOODS), draw.choice(SUBJECTS)
    name_zh, food_zh, few = draw.choice(NAMES_ZH), draw.choice(FOODS_ZH), draw.randint(2, 9)
    question, answer = draw.choice(
        [
            (f"What is {first} + {second}?", f"{first} + {second} = {first + second}. The answer is {first + second}."),
            (f"Where does {subject} come from?", f"{subject.capitalize()} comes from {ORIGINS[subject]}."),
            (
                f"{name} has {first} {food} and gets {second} more. How many {food} does {name} have?",
                f"{first} + {second} = {first + second}, so {name} has {first + second} {food}.",
            ),
            (
                f"Write a Python function that adds {second}.",
                f"def add(number):\n    return number + {second}",
            ),
            (
                f"{name_zh}有{first}个{food_zh}，又买了{few}个。现在有几个？",
                f"{first} + {few} = {first + few}，{name_zh}现在有{first + few}个{food_zh}。",
            ),
        ]
    )
    return f"Question: {question}\nAnswer: {answer}"


WRITERS: Mapping[str, Callable[[Generator], str]] = {
    "web": write_story,
    "code": write_code,
    "mathematics": write_problem,
    "chinese": write_chinese,
    "instruction": write_answer,
}


def write_corpus(folder: Path, seed: int) -> None:
    """Write a file of each category, no text twice, and `held_out.jsonl`: the same for every seed, and in no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = make_held_out()
    write_rows(folder / "held_out.jsonl", held_out)
    for category, write in WRITERS.items():
        draw, rows, size = random.Random(f"{seed} {category}"), dict.fromkeys(held_out), 0
        while size < SIZES[category]:
            text = write(draw)
            size += len(text.encode()) if text not in rows else 0
            rows[text] = None
        write_rows(folder / f"{category}.jsonl", list(rows)[len(held_out) :])


def make_held_out() -> list[str]:
    """Return texts to evaluate on."""
    draw, rows = random.Random(HELD_OUT_SEED), dict[str, None]()
    for category, count in HELD_OUT_ROWS.items():
        goal = len(rows) + count
        while len(rows) < goal:
            rows[WRITERS[category](draw)] = None
    return list(rows)


def write_rows(path: Path, rows: list[str]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    write_corpus(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
