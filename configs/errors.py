"""The one exception of this package. A mistake in a configuration is a person's to mend: it names the place."""
from __future__ import annotations

_LONGEST_VALUE = 120  # characters of a value that are worth showing


class _NoValue:
    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE = _NoValue()  # no value to show; None is a value


class ConfigError(Exception):
    """`what` is wrong, `where` (file:line or the --set argument), at which `key`, its `value`, a `hint` to mend it.

    Prints as `where: key = value: what`, the hint on a line of its own; unknown parts are left out.
    """

    exit_code = 2

    def __init__(self, what: str, where: str | None = None, key: str | None = None, value: object = NO_VALUE,
                 hint: str | None = None) -> None:
        self.what, self.where, self.key, self.value, self.hint = what, where, key, value, hint
        super().__init__(what)

    def __str__(self) -> str:
        subject = self.key or ""
        if self.value is not NO_VALUE:
            shown = _shorten(repr(self.value))
            subject = f"{subject} = {shown}" if subject else shown
        line = ": ".join(part for part in (self.where, subject, self.what) if part)
        return f"{line}\n  {self.hint}" if self.hint else line


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
