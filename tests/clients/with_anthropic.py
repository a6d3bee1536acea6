"""anthropic."""

import base64

import anthropic
from scene import FILE, IMAGES, KEY, MODEL, QUESTION, SERVER, check

client = anthropic.Anthropic(base_url=SERVER, api_key=KEY)
sources = {
    "data": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(FILE).decode()},
    "url": {"type": "url", "url": IMAGES["url"]},
}
for form, source in sources.items():
    asked = {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]}
    answer = client.messages.create(model=MODEL, max_tokens=60, messages=[asked], system="Be brief.")
    check(form, answer.content[0].text)
    again = [asked, {"role": "assistant", "content": answer.content[0].text}, asked]
    check(f"{form}, second turn", client.messages.create(model=MODEL, max_tokens=60, messages=again).content[0].text)
    with client.messages.stream(model=MODEL, max_tokens=60, messages=[asked]) as stream:
        check(f"{form}, streamed", stream.get_final_text())
schema = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
tool = {"name": "shape", "description": "A shape.", "input_schema": schema}
called = client.messages.create(
    model=MODEL, max_tokens=200, messages=[asked], tools=[tool], tool_choice={"type": "tool", "name": "shape"}
)
print(f"tools: {called.content[0].input['kind']!r}, {called.stop_reason}")
