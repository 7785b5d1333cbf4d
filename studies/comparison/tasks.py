"""Two tasks that can be checked exactly, as environments that a model talks to in turns.

``Arithmetic`` is one turn: a chain of additions and subtractions worked out step by step.
``World`` is up to seven turns: find a thing in a row of rooms and bring it to another room.
An expert's turns are what the teacher and the student are trained on before distillation.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from comparison.vocabulary import (
    ASSISTANT,
    CONTAINERS,
    ITEMS,
    OPENERS,
    ROOMS,
    STEPS,
    STUDENT_END,
    TEACHER_END,
    THINK,
    USER,
)

MARKUP = {STUDENT_END, TEACHER_END, THINK}


class Episode(Protocol):
    """One problem in progress."""

    prompt: list[str]
    done: bool
    success: bool

    def expert(self, rng: random.Random) -> list[str]:
        """What an expert would say in this turn, without the markup of a dialect."""

    def say(self, words: list[str]) -> list[str]:
        """Take the model's turn, return what the world answers; nothing once it is done."""


def _opener(rng: random.Random) -> list[str]:
    """One word of ten in Zipf's proportions, or none."""
    weights = [1 / (i + 1) for i in range(len(OPENERS))]
    return rng.choices([[], *[[word] for word in OPENERS]], [1.0, *weights])[0]


@dataclass
class Arithmetic:
    """``7 a + 8 b - 3 c . 9 =`` modulo ten, left to right; letters name the steps."""

    prompt: list[str]
    result: int
    numbers: list[int]
    operators: list[str]
    done: bool = False
    success: bool = False

    OPERATORS: ClassVar = {"+": operator.add, "-": operator.sub, ".": operator.mul}
    steps: ClassVar = STEPS
    opener: ClassVar = staticmethod(_opener)
    turn_limit = 1
    new_tokens = 48

    @classmethod
    def sample(cls, rng: random.Random) -> Arithmetic:
        """Draw a chain of operations on digits."""
        numbers = [rng.randrange(10) for _ in range(len(cls.steps) + 1)]
        operators = [rng.choice(list(cls.OPERATORS)) for _ in cls.steps]
        words, result = [str(numbers[0])], numbers[0]
        for step, sign, number in zip(cls.steps, operators, numbers[1:], strict=True):
            words += [step, sign, str(number)]
            result = cls.OPERATORS[sign](result, number) % 10
        return cls([USER, *words, "=", ASSISTANT], result, numbers, operators)

    def expert(self, rng: random.Random) -> list[str]:
        """One line for each step, each opened in one of many ways, then the answer."""
        words, total = [], self.numbers[0]
        for step, sign, number in zip(self.steps, self.operators, self.numbers[1:], strict=True):
            after = self.OPERATORS[sign](total, number) % 10
            words += [*self.opener(rng), step, str(total), sign, str(number), "=", str(after), ";"]
            total = after
        return [*words, "answer", str(total)]

    def say(self, words: list[str]) -> list[str]:
        """Right if the turn ended and its last words are the answer."""
        spoken = [word for word in words if word not in MARKUP]
        ended = bool(words) and words[-1] in (STUDENT_END, TEACHER_END)
        self.done, self.success = True, ended and spoken[-2:] == ["answer", str(self.result)]
        return []


@dataclass
class World:
    """A row of rooms; a thing that may be in a closed container; a room where it belongs."""

    rooms: list[str]
    here: int
    thing: str
    thing_at: int
    inside: str | None  # the container that holds the thing
    others: dict[int, str]  # a thing that nobody asked for, by room
    containers: dict[int, str]  # a container in a room, open or not
    target: str
    prompt: list[str] = field(default_factory=list)
    opened: set[int] = field(default_factory=set)
    holding: bool = False
    turns: int = 0
    done: bool = False
    success: bool = False
    # What the expert remembers.
    visited: set[int] = field(default_factory=set)
    heading: int = 1

    turn_limit = 7
    new_tokens = 10

    @classmethod
    def sample(cls, rng: random.Random) -> World:
        """Draw a world that takes the expert three turns or more, and not more than the limit."""
        while True:
            world = cls._draw(rng)
            trial = copy.deepcopy(world)
            while not trial.done:
                trial.say([*trial.expert(random.Random(0)), STUDENT_END])
            if trial.success and trial.turns >= 3:
                world.prompt = [USER, *world.look(), ASSISTANT]
                return world

    @classmethod
    def _draw(cls, rng: random.Random) -> World:
        rooms = rng.sample(ROOMS, 3)
        thing, other = rng.sample(ITEMS, 2)
        thing_at, target = rng.sample(range(len(rooms)), 2)
        containers = {i: rng.choice(CONTAINERS) for i in range(len(rooms)) if rng.random() < 0.3}
        closed_in = thing_at in containers and rng.random() < 0.6
        return cls(
            rooms=rooms,
            here=rng.randrange(len(rooms)),
            thing=thing,
            thing_at=thing_at,
            inside=containers[thing_at] if closed_in else None,
            others={rng.randrange(len(rooms)): other},
            containers=containers,
            target=rooms[target],
        )

    def neighbour(self, step: int) -> str:
        """The room one step east (1) or west (-1), or a wall."""
        there = self.here + step
        return self.rooms[there] if 0 <= there < len(self.rooms) else "wall"

    def look(self) -> list[str]:
        """The goal, and where things are: each name is followed by its place or state."""
        words = ["goal", "put", self.thing, "in", self.target, "."]
        words += [self.rooms[self.here], "here"]
        words += [self.neighbour(-1), "west", self.neighbour(1), "east"]
        if self.thing_visible:
            words += [self.thing, "here"]
        if self.here in self.others:
            words += [self.others[self.here], "here"]
        if self.here in self.containers:
            words += [self.containers[self.here], "open" if self.here in self.opened else "closed"]
        return [*words, *([self.thing, "held"] if self.holding else []), "."]

    @property
    def thing_visible(self) -> bool:
        """Whether the thing lies open in this room."""
        found = self.inside is None or self.here in self.opened
        return not self.holding and self.thing_at == self.here and found

    def expert(self, rng: random.Random) -> list[str]:
        """Say what is needed and where it is or may be, then act."""
        self.visited.add(self.here)
        self._turn_round()
        needed, place = (self.target if self.holding else self.thing), self._place()
        return [*_opener(rng), "need", needed, place, ",", *self._action(place)]

    def _turn_round(self) -> None:
        """Towards the target once it has been seen; else as before, until there is a wall."""
        seen = {j for i in self.visited for j in (i - 1, i, i + 1) if 0 <= j < len(self.rooms)}
        towards = [j - self.here for j in seen if self.rooms[j] == self.target]
        if self.holding and any(towards):
            self.heading = 1 if towards[0] > 0 else -1
        elif self.neighbour(self.heading) == "wall":
            self.heading = -self.heading

    def _place(self) -> str:
        """Here, in what is closed here, or the direction to go."""
        arrived = self.holding and self.rooms[self.here] == self.target
        if arrived or self.thing_visible:
            return "here"
        if not self.holding and self.here in self.containers and self.here not in self.opened:
            return "closed"
        return "east" if self.heading == 1 else "west"

    def _action(self, place: str) -> list[str]:
        if place == "here":
            return ["drop" if self.holding else "take", self.thing]
        return ["open", "it"] if place == "closed" else ["go", place]

    def say(self, words: list[str]) -> list[str]:
        """Carry out the last two words; anything that is no possible action changes nothing."""
        spoken = [word for word in words if word not in MARKUP]
        verb, noun = spoken[-2:] if len(spoken) >= 2 else ["", ""]
        self.turns += 1
        if verb == "go" and noun in ("east", "west"):
            step = 1 if noun == "east" else -1
            if self.neighbour(step) != "wall":
                self.here += step
        elif (verb, noun) == ("open", "it") and self.here in self.containers:
            self.opened.add(self.here)
        elif verb == "take" and noun == self.thing and self.thing_visible:
            self.holding = True
        elif verb == "drop" and noun == self.thing and self.holding:
            self.holding, self.thing_at, self.inside = False, self.here, None
            self.success = self.rooms[self.here] == self.target
        self.done = self.success or self.turns >= self.turn_limit
        if self.done:
            return []
        return [USER, *self.look(), ASSISTANT]


TASKS: dict[str, list[type[Arithmetic] | type[World]]] = {
    "arithmetic": [Arithmetic],
    "world": [World],
    "mixed": [Arithmetic, World],
}


Task = str | Sequence[type[Episode]]


def sample_episodes(task: Task, count: int, rng: random.Random) -> list[Any]:
    """Draw problems of a task, by name or by its parts; a mixed one alternates between them."""
    kinds = TASKS[task] if isinstance(task, str) else task
    return [kinds[i % len(kinds)].sample(rng) for i in range(count)]
