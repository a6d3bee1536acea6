"""ollama."""

import json

import ollama
from scene import FILE, MODEL, QUESTION, SERVER, check, held

client = ollama.Client(host=SERVER)
asked = {"role": "user", "content": QUESTION, "images": [FILE]}
answer = client.chat(model=MODEL, messages=[asked])
check("chat", answer.message.content)
check("chat, second turn", client.chat(model=MODEL, messages=[asked, answer.message, asked]).message.content)
check("chat, streamed", "".join(part.message.content for part in client.chat(MODEL, [asked], stream=True)))
check("generate", client.generate(MODEL, QUESTION, images=[FILE]).response)
check(
    "generate, streamed",
    "".join(part.response for part in client.generate(MODEL, QUESTION, images=[FILE], stream=True)),
)
schema = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
held("format", json.loads(client.chat(MODEL, [asked], format=schema).message.content)["kind"], str)
held("list", client.list().models[0].model, str)
