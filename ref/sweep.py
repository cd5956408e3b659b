"""A function compared over many shapes: `python -m ref verify --callable ... --sweep`."""

import json
import math
from dataclasses import dataclass

from ref import Error, cases, frameworks, verify
from ref.backend import check_choice

LENGTHS = (1, 2, 3, 7, 64, 127, 1000, 2048)  # of a sweep
WIDTHS = ((8, 16), (5, 7), (6, 5), (7, 4))  # of a sweep: D, N


@dataclass(frozen=True)
class Sweep:
    """Reports over a ladder of shapes."""

    reports: tuple
    skipped: tuple = ()  # (shape, why the model does not have it)
    detail: object = None  # of the smallest shape that fails, with hints

    @property
    def ok(self):
        """Whether all shapes agree."""
        return all(r.ok for r in self.reports)

    @property
    def smallest(self):
        """Sizes of the smallest shape that fails, by L, then in all; None"""
        failing = [r.sizes for r in self.reports if not r.ok]
        return min(failing, key=_size, default=None)

    @property
    def rows(self):
        """The worst row of each tensor."""
        return verify.worst_of([r for r in self.reports if not r.problem] or [*self.reports]).rows

    def closing(self, quiet=False):
        """What comes after the lines of the shapes"""
        agree = f"{sum(r.ok for r in self.reports)} of {len(self.reports)} shapes agree"
        if self.ok:
            return agree
        return f"{agree}; the smallest that fails: {', '.join(verify.named(self.smallest))}\n" + (
            self.detail or next(r for r in self.reports if not r.ok)
        ).text(quiet)

    def text(self, quiet=False):
        """What the command prints: a line a shape, and the smallest that fails"""
        lines = [_shape_line(r) for r in self.reports]
        return "\n".join([*lines, *(_skipped(*s) for s in self.skipped), self.closing(quiet)])

    def as_dict(self):
        """What JSON can hold"""
        skipped = [{"shape": shape, "why": why} for shape, why in self.skipped]
        reports = [r.as_dict() for r in self.reports]
        detail = self.detail and self.detail.as_dict()
        own = {"ok": self.ok, "smallest": self.smallest, "detail": detail}
        return own | {"reports": reports, "skipped": skipped}

    def json(self):
        """The sweep as JSON"""
        return json.dumps(self.as_dict())


def _size(sizes):
    return sizes.get("L", 0), math.prod(sizes.values())


def _shape_line(report):
    shape = ", ".join(verify.named(report.sizes))
    if report.problem:
        return f"FAIL  {shape}: {report.problem}"
    if not report.ok:
        return f"FAIL  {shape}: {', '.join(row.tensor for row in report.rows if not row.ok)}"
    row = max(report.rows, key=lambda row: row.excess)
    return f"ok    {shape}: {row.tensor} at {row.excess:.2f} of what is allowed"


def _skipped(shape, why):
    return f"      {', '.join(verify.named(shape))}: {why}"


def over_shapes(
    f,
    model,
    part,
    dtype="float32",
    settings=None,
    seed=0,
    seeds=1,
    D=None,
    N=None,
    framework="numpy",
    initial_state=False,
    label="",
    show=None,
):
    """verify_callable over L in LENGTHS, B in 1, 2, 3, D and N odd and even -> Sweep.

    D and N stay what they are when given. show(line): called for each shape.   Error: as
    verify_callable; a shape that the model does not have is skipped
    """
    check_choice("dtype", dtype, cases.PRECISIONS)
    frameworks.check(framework)
    seeds = range(seed, seed + seeds)
    done, skipped = [], []

    def on(drawn, explain):
        return verify.worst_of(
            [
                verify.report_on(f, c, framework, label, i, explain)
                for i, c in zip(seeds, drawn, strict=True)
            ]
        )

    def tell(line):
        if show:
            show(line)

    for B, L, widths in _shapes(D, N):
        try:
            drawn = _drawn(model, part, settings, B, L, widths, dtype, seeds, initial_state)
        except Error as e:
            skipped.append(({"B": B, "L": L}, str(e)))
            tell(_skipped(*skipped[-1]))
            continue
        done.append((on(drawn, False), drawn))
        tell(_shape_line(done[-1][0]))
    if not done:
        raise Error(skipped[0][1])
    reports, failing = tuple(r for r, _ in done), [(r, d) for r, d in done if not r.ok]
    detail = None
    if failing:
        detail = on(min(failing, key=lambda one: _size(one[0].sizes))[1], True)
    return Sweep(reports, tuple(skipped), detail)


def _shapes(D, N):
    """(B, L, choices of (D, N)): the next of WIDTHS, then with N, D or both rounded up"""
    at = 0
    for L in LENGTHS:
        for B in (1, 2, 3):
            d, n = WIDTHS[at % len(WIDTHS)]
            at += 1
            d, n = d if D is None else D, n if N is None else N
            even = d + (d % 2 if D is None else 0), n + (n % 2 if N is None else 0)
            eight = even[0] if D is not None else -(-d // 8) * 8, even[1]  # for several heads
            yield B, L, [*dict.fromkeys([(d, n), (d, even[1]), (even[0], n), even, eight])]


def _drawn(model, part, settings, B, L, widths, dtype, seeds, initial_state):
    """Cases of the first of the widths that the model has, one a seed.   Error: it has none"""
    refused = None
    for D, N in widths:
        own = verify.case_settings(model, part, settings, D, N, needed=False)
        try:
            return [cases.draw(model, part, own, B, L, dtype, i, initial_state)[0] for i in seeds]
        except Error as e:
            refused = refused or e
    raise refused
