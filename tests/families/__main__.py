"""Write docs/models.md. `sweep [MODEL_TYPE ...]`: make and try a checkpoint of each; `sweep`: of all, and write down
what became of them."""

import sys

from tests.families.models_page import PAGE, page
from tests.families.sweep import NAMES, swept, write_swept

if sys.argv[1:2] == ["sweep"]:
    found = []
    for outcome in swept(sys.argv[2:] or NAMES):
        found.append(outcome)
        print(outcome, flush=True)
    if not sys.argv[2:]:
        write_swept(found)
PAGE.write_text(page())
