"""Chat templates that write every content as it is, which a proof from their text shows.

Most templates put the same words around the contents of a conversation whatever these contents are: what they
write depends on the roles alone. One rendering with a marker for each content then serves all conversations
with these roles. Only a proof is good enough, because a template may look at its contents: `looks_for` says
what for, and gives up wherever it is not sure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols

from orpo.pairs import Message

_MARKER = re.compile(r"ORPO content (\d+) marker")
_ROLES = ("system", "user", "assistant")
_TYPES = {"string", "defined", "undefined", "none", "mapping", "sequence", "iterable"}
"""Tests of a content that come out the same for every text."""
_METHODS = {"items", "keys", "values", "get", "pop", "copy", "update"}
_STRIPS = {"strip", "lstrip", "rstrip"}


class VerbatimWriter:
    """Writes conversations as a template does that writes contents verbatim."""

    def __init__(self, render: Callable[[Sequence[Message], bool], str], looked_for: frozenset[str]):
        """Keep the renderer.

        Args:
            render: Renders a conversation with the template; the flag asks for an answer.
            looked_for: What `looks_for` gives for the template.
        """
        self._render = render
        self._looked_for = tuple(looked_for)
        self._parts: dict[tuple[str | bool, ...], list[str]] = {}

    def write(self, turns: Sequence[Message], *, ask: bool) -> str | None:
        """The conversation; None where it must be rendered.

        A content with blanks around it must be: templates strip them, or not.
        """
        key: list[str | bool] = [ask]
        for turn in turns:
            content, role = turn["content"], turn["role"]
            if len(turn) != 2 or role not in _ROLES or not content or content != content.strip():
                return None
            if any(text in content for text in self._looked_for):
                return None
            key.append(role)
        shape = tuple(key)
        parts = self._parts.get(shape)
        if parts is None:
            marked = [
                {"role": turn["role"], "content": f"ORPO content {index} marker"}
                for index, turn in enumerate(turns)
            ]
            parts = self._parts[shape] = _MARKER.split(self._render(marked, ask))
        written = parts.copy()
        written[1::2] = [turns[int(index)]["content"] for index in parts[1::2]]
        return "".join(written)


def looks_for(text: str) -> frozenset[str] | None:
    """What a template looks for in contents, which it else writes as they are; None where it may do more.

    It is asked about messages that have a role of `_ROLES` and a content only, which is text, not empty and
    without blanks around it, and about conversations without tools.

    Args:
        text: Of the template, in Jinja.
    """
    try:
        tree = jinja2.Environment(extensions=[loopcontrols]).parse(text)
    except jinja2.TemplateError:
        return None
    proof = _Proof(tree)
    return frozenset(proof.looked_for) if proof.holds() else None


class _Proof:
    """What is known of the names in one template: which hold contents, which messages or lists of them."""

    def __init__(self, tree: nodes.Template):
        self.tree = tree
        self.contents: set[str] = set()
        self.messages = {"messages"}
        self.looked_for: set[str] = set()
        self.searched: set[str] = set()
        """Names that hold contents in which something is looked for."""
        self._grow()

    def _grow(self) -> None:
        """Find the names, wherever they are assigned, until no more are found."""
        before = -1
        while before != (before := len(self.contents) + len(self.messages)):
            for one in self._live(self.tree):
                if isinstance(one, nodes.Assign) and self._is_messages(one.node):
                    self.messages.add(_name(one.target))
                elif isinstance(one, nodes.Assign) and any(map(self._is_content, _all(one.node))):
                    self.contents.add(_name(one.target))
                elif isinstance(one, nodes.For) and self._is_messages(one.iter):
                    self.messages.add(_name(one.target))

    def holds(self) -> bool:
        self.looked_for, self.searched = set(), set()
        statements = list(self._live(self.tree))
        if self.contents & self.messages or not all(map(self._is_sound, statements)):
            return False
        inside = (one for statement in statements for one in _inside(statement))
        if any(_key(one) == "content" and not self._is_content(one) for one in inside):
            return False  # a content of we do not know what
        # What is looked for must lie in one content: not in the words that a template puts in front of it.
        assigned = [one for one in statements if isinstance(one, nodes.Assign)]
        return all(self._is_pure(one.node) for one in assigned if _name(one.target) in self.searched)

    def _live(self, node: nodes.Node) -> Iterator[nodes.Node]:
        """The statements in a node that may be reached, those inside others too."""
        if isinstance(node, nodes.If):
            branches: list[tuple[nodes.Node | None, list[nodes.Node]]] = [(node.test, node.body)]
            branches += [(one.test, one.body) for one in node.elif_]
            for test, body in [*branches, (None, node.else_)]:
                if test is not None:
                    yield test
                if test is None or not self._never(test):
                    yield from (inner for one in body for inner in self._live(one))
                if test is not None and self._always(test):
                    return
            return
        if isinstance(node, nodes.For):
            yield node
            yield from (inner for one in (*node.body, *node.else_) for inner in self._live(one))
        elif isinstance(node, nodes.Template):
            yield from (inner for one in node.body for inner in self._live(one))
        else:
            yield node

    def _is_sound(self, node: nodes.Node) -> bool:
        """Whether nothing in a statement depends on a content, but what it writes."""
        if isinstance(node, nodes.Output):
            return all(map(self._is_written, node.nodes))
        if isinstance(node, nodes.Assign):
            moved = isinstance(node.target, nodes.Name) and self._is_messages(node.node)
            return moved or self._is_written(node.node)
        if isinstance(node, nodes.For):
            fine = self._is_messages(node.iter) or self._is_fixed(node.iter)
            return fine and (node.test is None or self._is_test(node.test))
        if isinstance(node, nodes.Expr):
            return self._is_test(node)
        if isinstance(node, nodes.Macro):
            # What a macro is called with is looked at where it is called.
            return not any(self._is_content(one) or self._is_messages(one) for one in _all(node))
        return isinstance(node, nodes.Break | nodes.Continue) or all(
            self._is_fixed(one) and not self._is_messages(one) for one in node.find_all(nodes.Expr)
        )

    # ------------------------------------------------------------------------------------- what becomes of it

    def _is_written(self, node: nodes.Node) -> bool:
        """Whether an expression is text with contents in it, each as it is."""
        if self._is_content(node):
            return True
        if isinstance(node, nodes.Add):
            return self._is_written(node.left) and self._is_written(node.right)
        if isinstance(node, nodes.Concat):
            return all(map(self._is_written, node.nodes))
        if isinstance(node, nodes.Or) and self._is_content(node.left):
            return self._is_written(node.right)
        if isinstance(node, nodes.CondExpr):
            return self._is_test(node.test) and all(map(self._is_written, self._branches(node)))
        if isinstance(node, nodes.Filter) and node.name == "trim" and node.node is not None:
            return not node.args and self._is_written(node.node)
        if isinstance(node, nodes.Call) and _method(node) in _STRIPS:
            blank = all(isinstance(one, nodes.Const) and not str(one.value).strip() for one in node.args)
            return blank and not node.dyn_args and self._is_written(node.node.node)  # type: ignore[attr-defined]
        return self._is_fixed(node)

    def _is_test(self, node: nodes.Node) -> bool:
        """Whether an expression is true or false whatever the contents are: none of them is empty."""
        if isinstance(node, nodes.And | nodes.Or):
            if isinstance(node, nodes.And) and self._never(node.left):
                return self._is_test(node.left)
            return self._is_test(node.left) and self._is_test(node.right)
        if isinstance(node, nodes.Not):
            return self._is_test(node.node)
        if self._never(node) or self._always(node) or self._is_content(node):
            return True
        return self._is_fixed(node)

    def _is_fixed(self, node: nodes.Node) -> bool:
        """Whether an expression comes out the same whatever the contents are."""
        if self._is_content(node):
            return False
        if isinstance(node, nodes.Test) and node.name in _TYPES and not node.args:
            return any(kind(node.node) for kind in (self._is_content, self._is_messages, self._is_fixed))
        if isinstance(node, nodes.Filter) and node.name in ("length", "count") and node.node is not None:
            return self._is_messages(node.node) or self._is_fixed(node.node)
        if isinstance(node, nodes.Compare) and self._is_content(node.expr):
            # No text equals one of these.
            others = [one.expr for one in node.ops if one.op in ("eq", "ne")]
            none = [
                one for one in others if isinstance(one, nodes.Const) and one.value in (None, True, False)
            ]
            return len(none) == len(node.ops)
        if self._looks(node) or self._has_key(node) is not None:
            return True
        if self._field(node) is not None:
            return self._place_is_fixed(node)
        return not self._is_messages(node) and all(map(self._is_fixed, node.iter_child_nodes()))

    def _never(self, node: nodes.Node) -> bool:
        """Whether a test is false for the messages in question."""
        if isinstance(node, nodes.And):
            return self._never(node.left) or self._never(node.right)
        if isinstance(node, nodes.Or):
            return self._never(node.left) and self._never(node.right)
        if isinstance(node, nodes.Not):
            return self._always(node.node)
        if isinstance(node, nodes.Test) and node.name in ("string", "defined", "mapping"):
            known = self._field(node.node)
            return known is not None and known not in ("role", "content")
        if isinstance(node, nodes.Compare) and self._field(node.expr) == "role" and len(node.ops) == 1:
            other = node.ops[0].expr
            return node.ops[0].op == "eq" and isinstance(other, nodes.Const) and other.value not in _ROLES
        if self._has_key(node) is not None:
            return self._has_key(node) is False
        return self._looks(node) or self._field(node) not in (None, "role", "content")

    def _always(self, node: nodes.Node) -> bool:
        """Whether a test is true for the messages in question."""
        if isinstance(node, nodes.And):
            return self._always(node.left) and self._always(node.right)
        if isinstance(node, nodes.Or):
            return self._always(node.left) or self._always(node.right)
        if isinstance(node, nodes.Not):
            return self._never(node.node)
        if isinstance(node, nodes.Test) and node.name in ("string", "defined"):
            return self._field(node.node) in ("role", "content")
        return self._has_key(node) is True

    def _looks(self, node: nodes.Node) -> bool:
        """Whether a test looks for a text in a content; notes the text, which contents must not have."""
        text: nodes.Node | None = None
        inside: nodes.Node | None = None
        if isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op == "in":
            text, inside = node.expr, node.ops[0].expr
        elif isinstance(node, nodes.Call) and _method(node) in ("startswith", "endswith") and node.args:
            text, inside = node.args[0], node.node.node  # type: ignore[attr-defined]
        if not isinstance(text, nodes.Const) or not isinstance(text.value, str) or not text.value:
            return False
        if inside is None or not self._is_content(inside):
            return False
        self.looked_for.add(text.value)
        if self._field(inside) is None:
            self.searched.add(_name(inside))
        return True

    def _is_pure(self, node: nodes.Node) -> bool:
        """Whether an expression is one content, or text without any."""
        if isinstance(node, nodes.Filter) and node.name == "trim" and node.node is not None:
            return self._is_pure(node.node)
        if isinstance(node, nodes.Name) and node.name in self.contents:
            return node.name in self.searched
        return self._field(node) == "content" or (isinstance(node, nodes.Const) and node.value == "")

    # ---------------------------------------------------------------------------------------- what a node is

    def _is_content(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name | nodes.Getattr) and _name(node) in self.contents:
            return True
        return self._field(node) == "content" and self._place_is_fixed(node)

    def _is_messages(self, node: nodes.Node) -> bool:
        """A message, a list of them, or a part of such a list."""
        if isinstance(node, nodes.Name):
            return node.name in self.messages
        if isinstance(node, nodes.CondExpr):
            return self._is_test(node.test) and all(map(self._is_messages, self._branches(node)))
        if isinstance(node, nodes.Getitem):
            return not isinstance(_key(node), str) and self._is_messages(node.node)
        if isinstance(node, nodes.Getattr) and node.attr in ("previtem", "nextitem"):
            return True
        return (
            isinstance(node, nodes.Filter)
            and node.name in ("first", "last", "list")
            and (node.node is not None and self._is_messages(node.node))
        )

    def _branches(self, node: nodes.CondExpr) -> list[nodes.Node]:
        """The values that a conditional expression can have."""
        branches: list[nodes.Node] = [] if self._never(node.test) else [node.expr1]
        return branches + ([node.expr2] if node.expr2 is not None and not self._always(node.test) else [])

    def _field(self, node: nodes.Node | None) -> str | None:
        """The key, where this is what a message has under one."""
        if not isinstance(node, nodes.Getattr | nodes.Getitem):
            return None
        key = _key(node)
        return key if isinstance(key, str) and key not in _METHODS and self._is_messages(node.node) else None

    def _has_key(self, node: nodes.Node) -> bool | None:
        """Whether a message has a key, where that is asked."""
        if (
            not isinstance(node, nodes.Compare)
            or len(node.ops) != 1
            or not isinstance(node.expr, nodes.Const)
        ):
            return None
        if node.ops[0].op not in ("in", "notin") or not self._is_messages(node.ops[0].expr):
            return None
        return (node.expr.value in ("role", "content")) == (node.ops[0].op == "in")

    def _place_is_fixed(self, node: nodes.Node) -> bool:
        """Whether the way to a field leads over no place in a list that depends on a content."""
        indices = [one.arg for one in _all(node) if isinstance(one, nodes.Getitem)]
        return all(map(self._is_fixed, indices))


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _inside(statement: nodes.Node) -> Iterator[nodes.Node]:
    """The expressions of one statement, not those of the statements in it."""
    yield from _all(statement.iter if isinstance(statement, nodes.For) else statement)


def _name(node: nodes.Node) -> str:
    """What a name is known by: `text`, `space.text`."""
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return node.name if isinstance(node, nodes.Name) else f"no name {id(node)}"


def _method(call: nodes.Call) -> str | None:
    return call.node.attr if isinstance(call.node, nodes.Getattr) else None


def _key(node: nodes.Node) -> object:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None
