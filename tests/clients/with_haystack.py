"""Haystack."""

import base64

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.utils import Secret
from scene import BASE_URL, FILE, KEY, MODEL, QUESTION, check

image = ImageContent(base64_image=base64.b64encode(FILE).decode(), mime_type="image/png", detail="auto")
asked = ChatMessage.from_user(content_parts=[QUESTION, image])
model = OpenAIChatGenerator(model=MODEL, api_base_url=BASE_URL, api_key=Secret.from_token(KEY))
answer = model.run([asked])["replies"][0]
check("bytes", answer.text)
check("second turn", model.run([asked, answer, asked])["replies"][0].text)
pieces: list[str] = []
check("streamed", model.run([asked], streaming_callback=lambda chunk: pieces.append(chunk.content))["replies"][0].text)
check("its pieces", "".join(pieces))
