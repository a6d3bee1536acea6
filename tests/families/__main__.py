"""Write docs/models.md; `sweep [MODEL_TYPE ...]`: make and try a checkpoint of each, or of all."""

import sys

from tests.families.models_page import PAGE, page

if sys.argv[1:2] == ["sweep"]:
    from tests.families.sweep import NAMES, swept

    for outcome in swept(sys.argv[2:] or NAMES):
        print(outcome, flush=True)
else:
    PAGE.write_text(page())
