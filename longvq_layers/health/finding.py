"""One problem of a model."""

from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One problem that was seen in one module.

    Attributes:
        severity: "error" (the model can't learn), "warning" (it learns less than it could) or "note".
        kind: of problem, such as "dead_codes".
        module: name of the module or parameter in the model.
        seen: the readings.
        why: why it matters.
        change: what to change, with the names of arguments.
    """

    severity: str
    kind: str
    module: str
    seen: str
    why: str
    change: str

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.module or '(model)'}: {self.seen}\n    why: {self.why}\n    change: {self.change}"
        )
