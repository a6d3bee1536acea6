"""instructor, in the modes that OpenAI's API has."""

import instructor
import openai
from pydantic import BaseModel
from scene import BASE_URL, IMAGES, KEY, MODEL, QUESTION, content, held


class Shape(BaseModel):
    kind: str
    sides: int


client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    patched = instructor.from_openai(client, mode=mode)
    messages = [{"role": "user", "content": content("data")}]
    held(str(mode), patched.chat.completions.create(model=MODEL, messages=messages, response_model=Shape), Shape)
seen = [{"type": "input_image", "image_url": IMAGES["data"]}, {"type": "input_text", "text": QUESTION}]
patched = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
found = patched.responses.create(model=MODEL, input=[{"role": "user", "content": seen}], response_model=Shape)
held("responses", found, Shape)
