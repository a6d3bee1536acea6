"""instructor asks for structured output: a clear refusal is what it gets."""

import instructor
import openai
from pydantic import BaseModel
from scene import BASE_URL, KEY, MODEL, content, refused


class Shape(BaseModel):
    kind: str


client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
for mode, words in ((instructor.Mode.TOOLS, "tools are not"), (instructor.Mode.JSON, "structured output is not")):
    try:
        instructor.from_openai(client, mode=mode).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content("data")}], response_model=Shape, max_retries=1
        )
    except Exception as error:
        refused(str(mode), error, words)
    else:
        raise SystemExit(f"{mode} was not refused")
