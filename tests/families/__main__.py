"""Write docs/models.md."""

from tests.families.models_page import PAGE, page

PAGE.write_text(page())
