"""langchain-openai."""

import base64

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scene import BASE_URL, FILE, IMAGES, KEY, MODEL, QUESTION, check, content, held, refused

model = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY)
for form in IMAGES:
    asked = HumanMessage(content(form))
    answer = model.invoke([asked])
    check(form, answer.content)
    assert answer.usage_metadata["input_tokens"] > 0
    check(f"{form}, second turn", model.invoke([SystemMessage("Be brief."), asked, answer, asked]).content)
    check(f"{form}, streamed", "".join(chunk.content for chunk in model.stream([asked])))
own = {"type": "image", "base64": base64.b64encode(FILE).decode(), "mime_type": "image/png"}
check("its own image block", model.invoke([HumanMessage([{"type": "text", "text": QUESTION}, own])]).content)
check("batch", model.batch([[asked], [asked]])[1].content)


class Shape(BaseModel):
    """A shape."""

    kind: str
    sides: int


for method in ("json_schema", "function_calling", "json_mode"):
    try:
        found = model.with_structured_output(Shape, method=method).invoke([asked])
    except Exception as error:
        if method != "json_mode":  # any object is JSON: which fields it has is the model's to know
            raise
        refused(method, error, "Shape")
        continue
    held(method, found, Shape)
called = model.bind_tools([Shape], tool_choice="any").invoke([asked])
held("bind_tools", Shape(**called.tool_calls[0]["args"]), Shape)
held("bind_tools, left to the model", model.bind_tools([Shape]).invoke([asked]).text, str)
own = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, use_responses_api=True)
check("responses", own.invoke([asked]).text)
