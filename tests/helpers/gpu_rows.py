"""Rows for a test of `benchmarks.tables_gpu`: ones that work, and one of each way not to."""

import os
import time

from benchmarks.gpu.rows import Row, Target

COLUMNS = {"value": "value"}
TARGETS = (Target("value", {"method": "one"}, least=2), Target("value", {"method": "two"}, most=2))


def values(module, on):
    return [{"method": "one", "value": 1.0}, {"method": "two", "value": 2.0}, {"method": "three", "value": 3.0}]


def raises(module, on):
    raise ValueError("as /a/folder/of/it said\nand more")


def lacks(module, on):
    import no_such_library  # noqa: F401


def lacks_our_own(module, on):
    import ailurus_hf.no_such_module  # noqa: F401


def dies(module, on):
    os._exit(7)


def hangs(module, on):
    time.sleep(600)


def does_not_hold(module, on):
    return [{"check": "a", "holds": True, "note": ""}, {"check": "b", "holds": False, "note": "differs"}]


def row(name, measure, **fields):
    return Row(name, f"{name} it does", "gpu_rows", measure, "fp32", **{"minutes": 0.5, **fields})


ROWS = {
    each.key: each
    for each in (
        row("works", values, targets=TARGETS),
        row("raises", raises),
        row("lacks", lacks),
        row("lacks_our_own", lacks_our_own),
        row("dies", dies),
        row("hangs", hangs, minutes=0.0125),
        row("does_not_hold", does_not_hold),
        row("only_cuda", values, cuda=True),
        row("too_long", values, minutes=100),
        row("works_too", values),
    )
}
