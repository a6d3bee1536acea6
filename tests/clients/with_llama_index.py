"""LlamaIndex: OpenAI-like and OpenAI's own class."""

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from scene import BASE_URL, FILE, IMAGES, KEY, MODEL, QUESTION, check

model = OpenAILike(model=MODEL, api_base=BASE_URL, api_key=KEY, is_chat_model=True, context_window=4096)
images = {form: ImageBlock(url=url) for form, url in IMAGES.items() if form != "id"}
images["bytes"] = ImageBlock(image=FILE, detail="low")
for form, image in images.items():
    asked = ChatMessage(role="user", blocks=[TextBlock(text=QUESTION), image])
    answer = model.chat([asked]).message
    check(form, answer.content)
    check(f"{form}, second turn", model.chat([asked, answer, asked]).message.content)
    check(f"{form}, streamed", list(model.stream_chat([asked]))[-1].message.content)
print("text only:", model.complete("Say hello.").text)
