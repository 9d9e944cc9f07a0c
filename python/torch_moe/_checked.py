"""What all configs share: they check themselves when they are made."""

from typing import Literal, get_args, get_origin, get_type_hints


class Checked:
    """A config that checks itself: the values of every Literal field, then what `_check` says."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                self._require(
                    getattr(self, name) in choices, f"{name} must be in {choices}, got {getattr(self, name)!r}"
                )
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def _require_at_least_1(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")

    def is_default(self, name: str) -> bool:
        """Tell whether a field that has a default holds it."""
        return bool(getattr(self, name) == getattr(type(self), name))

    def _require_default_unless(self, condition: bool, needs: str, *names: str) -> None:
        """Refuse options that would do nothing."""
        for name in names:
            unused = condition or self.is_default(name)
            self._require(
                unused, f"{name}={getattr(self, name)!r} does nothing without {needs}: set it or leave {name}"
            )
