"""Schemas that hold at once, as alternatives without schemas in one another: what `$ref`, `allOf`, `anyOf`, `oneOf`, `not`,
`if` and dependencies say of the value itself is worked out, so that what is left are limits of its type and its parts.

A schema's opposite is a union of what each keyword forbids. Where that cannot be written as keywords it is left out: the
alternatives are then a part of what the schema allows, never more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from batchmix.structured_output.constants import Constants
from batchmix.structured_output.ecma_regex import found_automaton
from batchmix.structured_output.json_values import normal, refusal
from batchmix.structured_output.keywords import ONLY, SINCE, TYPES, Made, Negated, Reader
from batchmix.structured_output.limits import Alternative, Atom, Limits
from batchmix.structured_output.opposites import forbidden_by_limits
from batchmix.structured_output.pattern import BeyondUs
from batchmix.structured_output.references import References

_MAX_ALTERNATIVES = 256
_MAX_STEPS = 20_000  # schemas looked at for one set of alternatives
_PROOF_DEPTH = 3  # schemas within a required property, of those that are looked at to find that nothing fits


@dataclass
class _State:
    """One alternative in the making."""

    todo: list[tuple[Atom, frozenset[tuple[int, bool]]]]  # with what led to it
    limits: list[Limits] = field(default_factory=list)
    seen: set[tuple[int, bool]] = field(default_factory=set)
    # Still to make: of each, one list of schemas holds; with what led to it.
    choices: list[tuple[list[list[Atom]], frozenset[tuple[int, bool]]]] = field(default_factory=list)


class Alternatives:
    """Of the schemas of one document."""

    def __init__(self, reader: Reader, references: References) -> None:
        self._reader, self._references = reader, references
        self._made: list[Any] = []  # keeps what has been made alive, for identities
        self._opposites: dict[int, list[list[Atom]]] = {}  # by identity, as the next
        self._one_ofs: dict[int, list[list[Atom]]] = {}
        self.constants = Constants(self, reader)
        self._steps = 0

    def atom(self, schema: Any, base: str, path: str) -> Atom:
        """The schema as one that must hold."""
        if isinstance(schema, Negated):
            return Atom(schema.schema, self._base(schema.schema, base, path), path, True)
        if not isinstance(schema, Mapping | bool):
            raise refusal(path, f"is no schema but {schema!r}")
        return Atom(schema, self._base(schema, base, path), path)

    def _base(self, schema: Any, base: str, path: str) -> str:
        return base if isinstance(schema, Made) else self._references.base_of(schema, base, path)

    def of(self, atoms: Sequence[Atom]) -> list[Alternative]:
        """Ways for all of the schemas to hold. Unsupported where there are too many."""
        self._steps = 0
        return list(self._run(_State([(atom, frozenset()) for atom in atoms]), 0))

    def target(self, keywords: Mapping[str, Any], base: str, path: str) -> Atom | None:
        """What a schema refers to."""
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in keywords:
                if key != "$ref" and len({id(document) for document in self._references.documents.values()}) > 1:
                    raise refusal(path, f"has the keyword {key!r}, which is supported only without $id in the parts")
                target = self._references.target(keywords[key], base, f"{path}/{key}")
                return self.atom(target.schema, target.base, str(keywords[key]).removeprefix("#"))
        return None

    def _run(self, state: _State, depth: int) -> Iterator[Alternative]:
        pending = [state]
        count = 0
        while pending:
            state = pending.pop()
            if not self._settle(state):
                continue
            if not self._possible(state.limits, depth):
                continue
            if not state.choices:
                count += 1
                if count > _MAX_ALTERNATIVES:
                    raise BeyondUs("has more than 256 ways to hold (anyOf, oneOf, not, if, dependencies); use fewer")
                yield tuple(state.limits)
                continue
            (choice, led), *rest = state.choices
            for option in reversed(choice):
                todo = [(atom, led) for atom in option]
                pending.append(_State(todo, list(state.limits), set(state.seen), list(rest)))

    def _settle(self, state: _State) -> bool:
        """Work out what needs no choice. False where the schemas exclude each other."""
        while state.todo:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise BeyondUs("has too many ways to hold (anyOf, oneOf, not, if, dependencies); use fewer")
            atom, led = state.todo.pop(0)
            if atom.schema is True or atom.schema is False or atom.schema == {}:
                if (atom.schema is False) != atom.negated:
                    return False
                continue
            if atom.key in led:  # a schema that leads to itself says nothing
                return False
            if (atom.key[0], not atom.negated) in state.seen:
                return False
            if atom.key in state.seen:
                continue
            state.seen.add(atom.key)
            led = led | {atom.key}
            if atom.negated:
                options = self._opposite(atom)
                if not options:
                    return False
                if len(options) == 1:
                    state.todo = [*((one, led) for one in options[0]), *state.todo]
                else:
                    state.choices.append((options, led))
                continue
            holding, choices = self._parts(atom)
            if atom.silent:
                holding = [replace(one, silent=True) for one in holding]
                choices = [[[replace(one, silent=True) for one in option] for option in choice] for choice in choices]
            state.choices += [(choice, led) for choice in choices]
            state.limits.append(Limits(self._reader.read(atom.schema, atom.path), atom.base, atom.path, atom.silent))
            state.todo = [*((one, led) for one in holding), *state.todo]
        return True

    def _parts(self, atom: Atom) -> tuple[list[Atom], list[list[list[Atom]]]]:
        """Schemas that must hold too, and choices."""
        words = self._reader.read(atom.schema, atom.path)
        base, path = atom.base, atom.path
        holding = []
        target = self.target(words, base, path)
        if target is not None:
            holding.append(target)
        for i, one in enumerate(words.get("allOf", ())):
            holding.append(self.atom(one, base, f"{path}/allOf/{i}"))
        choices: list[list[list[Atom]]] = []
        if "anyOf" in words:
            choices.append([[self.atom(one, base, f"{path}/anyOf/{i}")] for i, one in enumerate(words["anyOf"])])
        if "oneOf" in words:
            if atom.key[0] not in self._one_ofs:
                options = [self.atom(one, base, f"{path}/oneOf/{i}") for i, one in enumerate(words["oneOf"])]
                self._one_ofs[atom.key[0]] = self._one_of(options)
            choices.append(self._one_ofs[atom.key[0]])
        if "not" in words:
            choices.append([[self._not(self.atom(words["not"], base, f"{path}/not"))]])
        if "if" in words:
            condition = self.atom(words["if"], base, f"{path}/if")
            then = [self.atom(words["then"], base, f"{path}/then")] if "then" in words else []
            other = [self.atom(words["else"], base, f"{path}/else")] if "else" in words else []
            if then or other:
                choices.append([[condition, *then], [self._not(condition), *other]])
        for name, needed in words.get("dependentRequired", {}).items():
            choices.append([[self._make({"properties": {name: False}}, base, path)],
                            [self._make({"type": ONLY["object"], "required": [name, *needed]}, base, path)]])  # fmt: skip
        for name, one in words.get("dependentSchemas", {}).items():
            own = self.atom(one, base, f"{path}/dependentSchemas/{name}")
            choices.append([[self._make({"properties": {name: False}}, base, path)],
                            [self._make({"type": ONLY["object"], "required": [name]}, base, path), own]])  # fmt: skip
        return holding, choices

    def _one_of(self, options: list[Atom]) -> list[list[Atom]]:
        """Each with the opposite of those that may hold beside it."""
        overlapping: dict[int, list[int]] = {i: [] for i in range(len(options))}
        tags = [self._tags(one) for one in options]
        for i, j in combinations(range(len(options)), 2):
            if _apart(tags[i], tags[j]):
                continue
            if options[i].key == options[j].key or self._some([options[i], options[j]], 1):
                overlapping[i].append(j)
                overlapping[j].append(i)
        return [[option, *(self._not(options[j]) for j in overlapping[i])] for i, option in enumerate(options)]

    def _tags(self, atom: Atom) -> dict[str, set[str]] | None:
        """Of a schema of objects: constants that required properties have, by name, as `normal` writes them."""
        if not isinstance(atom.schema, Mapping):
            return None
        words = self._reader.read(atom.schema, atom.path)
        target = self.target(words, atom.base, atom.path)
        if target is not None and target.key != atom.key and len(words) == 1:
            return self._tags(target) if isinstance(target.schema, Mapping) and "$ref" not in target.schema else None
        if words.get("type") != ONLY["object"]:
            return None
        found = {}
        for name in words.get("required", ()):
            one = words.get("properties", {}).get(name)
            if isinstance(one, Mapping) and ("const" in one or isinstance(one.get("enum"), list)):
                found[name] = {normal(value) for value in ([one["const"]] if "const" in one else one["enum"])}
        return found

    def _not(self, atom: Atom) -> Atom:
        return Atom(atom.schema, atom.base, atom.path, not atom.negated)

    def _make(self, keywords: dict[str, Any], base: str, path: str) -> Atom:
        made = Made(keywords)
        self._made.append(made)
        return Atom(made, base, path)

    def _opposite(self, atom: Atom) -> list[list[Atom]]:
        """Ways for a schema not to hold, as far as keywords can say them."""
        if id(atom.schema) not in self._opposites:
            self._opposites[id(atom.schema)] = [
                [
                    replace(one, silent=True) if isinstance(one, Atom) else self._make(one, atom.base, atom.path)
                    for one in option
                ]
                for option in self._forbidden(atom)
            ]
        return self._opposites[id(atom.schema)]

    def _forbidden(self, atom: Atom) -> Iterator[list[Atom | dict[str, Any]]]:
        draft = self._references.draft  # what a draft does not have forbids nothing
        words = {
            key: value for key, value in self._reader.read(atom.schema, atom.path).items() if SINCE.get(key, 0) <= draft
        }
        base, path = atom.base, atom.path
        target = self.target(words, base, path)
        if target is not None:
            yield [self._not(target)]
            if draft <= 7:  # where nothing beside it counts
                return
        for one in words.get("allOf", ()):
            yield [self._not(self.atom(one, base, path))]
        if "anyOf" in words:
            yield [self._not(self.atom(one, base, path)) for one in words["anyOf"]]
        if "oneOf" in words:
            options = [self.atom(one, base, path) for one in words["oneOf"]]
            yield [self._not(one) for one in options]
            for left, right in combinations(options, 2):
                yield [left, right]
        if "not" in words:
            yield [self.atom(words["not"], base, path)]
        if "if" in words:
            condition = self.atom(words["if"], base, path)
            if "then" in words:
                yield [condition, self._not(self.atom(words["then"], base, path))]
            if "else" in words:
                yield [self._not(condition), self._not(self.atom(words["else"], base, path))]
        for made in forbidden_by_limits(words):
            yield [made]

    def _possible(self, limits: Sequence[Limits], depth: int) -> bool:
        """False only where no value keeps all of the limits."""
        if self.constants.contradict(limits):
            return False
        if depth >= _PROOF_DEPTH:
            return True
        needed = required_names(limits)
        types = types_of(limits)
        if needed and types == ONLY["object"]:
            for name in needed:
                atoms = self.member(limits, name)
                if atoms is None or not self._some(atoms, depth + 1):
                    return False
        return True

    def _some(self, atoms: Sequence[Atom], depth: int) -> bool:
        return next(self._run(_State([(atom, frozenset()) for atom in atoms]), depth), None) is not None

    def member(self, limits: Sequence[Limits], name: str) -> list[Atom] | None:
        """The schemas of a property's value, None where it is forbidden."""
        found = []
        for one in limits:
            words, own = one.keywords, []
            if name in words.get("properties", ()):
                own.append(self.atom(words["properties"][name], one.base, f"{one.path}/properties/{name}"))
            for regex, schema in words.get("patternProperties", {}).items():
                automaton = found_automaton(regex)
                if automaton is not None and automaton.has(name):
                    own.append(self.atom(schema, one.base, f"{one.path}/patternProperties/{regex}"))
            if not own and "additionalProperties" in words:
                own.append(self.atom(words["additionalProperties"], one.base, f"{one.path}/additionalProperties"))
            if any((atom.schema is False) != atom.negated and isinstance(atom.schema, bool) for atom in own):
                return None
            found += own
        return [atom for atom in found if atom.schema is not True]


def types_of(limits: Iterable[Limits]) -> frozenset[str]:
    """The types that all limits allow, without "integer"."""
    found = frozenset(TYPES)
    for one in limits:
        found &= one.keywords.get("type", found)
    return found


def required_names(limits: Iterable[Limits]) -> list[str]:
    """The properties that must be there."""
    return list(dict.fromkeys(name for one in limits for name in one.keywords.get("required", ())))


def _apart(left: dict[str, set[str]] | None, right: dict[str, set[str]] | None) -> bool:
    return (
        left is not None
        and right is not None
        and any(not left[name] & right[name] for name in left.keys() & right.keys())
    )
