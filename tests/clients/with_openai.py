"""openai-python."""

import openai
from pydantic import BaseModel
from scene import BASE_URL, IMAGES, KEY, MODEL, check, content, refused

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


tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
for what, call, words in (
    ("model", lambda: client.chat.completions.create(model="gpt-4o", messages=messages[:1]), ("no such model",)),
    ("responses", lambda: client.responses.create(model=MODEL, input="Hi"), ("404", "/v1/chat/completions")),
    ("completions", lambda: client.completions.create(model=MODEL, prompt="Hi"), ("404", "/v1/chat/completions")),
    ("tools", lambda: client.chat.completions.create(model=MODEL, messages=messages[:1], tools=[tool]), ("tools are",)),
    (
        "structured output",
        lambda: client.chat.completions.parse(model=MODEL, messages=messages[:1], response_format=Shape),
        ("structured output is not supported",),
    ),
):
    try:
        call()
    except openai.APIStatusError as error:
        refused(what, error, *words)
    else:
        raise SystemExit(f"{what} was not refused")
