"""langchain-openai."""

import base64

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scene import BASE_URL, FILE, IMAGES, KEY, MODEL, QUESTION, check, content, refused

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


for what, call, words in (
    ("structured output", model.with_structured_output(Shape), "structured output is not supported"),
    ("tools", model.bind_tools([Shape]), "tools are not supported"),
):
    try:
        call.invoke([asked])
    except openai.BadRequestError as error:
        refused(what, error, words)
    else:
        raise SystemExit(f"{what} was not refused")
