"""openai-python."""

import openai
from pydantic import BaseModel
from scene import BASE_URL, IMAGES, KEY, MODEL, QUESTION, check, content, held, refused

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
for form in IMAGES:
    messages = [{"role": "user", "content": content(form)}]
    answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message
    check(form, answer.content)
    messages += [answer, *messages]
    check(
        f"{form}, second turn",
        client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content,
    )
    stream = client.chat.completions.create(
        model=MODEL, messages=messages[:1], stream=True, stream_options={"include_usage": True}
    )
    check(f"{form}, streamed", "".join(c.choices[0].delta.content or "" for c in stream if c.choices))
with client.chat.completions.stream(model=MODEL, messages=messages[:1]) as events:
    check("stream helper", events.get_final_completion().choices[0].message.content)

names = [model.id for model in client.models.list()]
assert names and client.models.retrieve(names[0]).id == names[0] and client.models.retrieve(MODEL).id == MODEL


class Shape(BaseModel):
    kind: str
    sides: int


parsed = (
    client.chat.completions.parse(model=MODEL, messages=messages[:1], response_format=Shape).choices[0].message.parsed
)
held("parse", parsed, Shape)
response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Shape)
held("responses.parse", response.output_parsed, Shape)
tools = [openai.pydantic_function_tool(Shape)]
called = client.chat.completions.parse(model=MODEL, messages=messages[:1], tools=tools, tool_choice="required")
held("tools", called.choices[0].message.tool_calls[0].function.parsed_arguments, Shape)

seen = [{"type": "input_image", "image_url": IMAGES["data"]}, {"type": "input_text", "text": QUESTION}]
response = client.responses.create(model=MODEL, input=[{"role": "user", "content": seen}])
check("responses", response.output_text)
check(
    "responses, second turn",
    client.responses.create(model=MODEL, input=QUESTION, previous_response_id=response.id).output_text,
)
with client.responses.stream(model=MODEL, input=[{"role": "user", "content": seen}]) as stream:
    check("responses, streamed", stream.get_final_response().output_text)

for what, call, words in (
    ("model", lambda: client.chat.completions.create(model="gpt-4o", messages=messages[:1]), ("no such model",)),
    ("completions", lambda: client.completions.create(model=MODEL, prompt="Hi"), ("404", "/v1/chat/completions")),
):
    try:
        call()
    except openai.APIStatusError as error:
        refused(what, error, *words)
    else:
        raise SystemExit(f"{what} was not refused")
