"""Pydantic AI."""

from pydantic_ai import Agent, BinaryContent, ImageUrl
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from scene import BASE_URL, FILE, IMAGES, KEY, MODEL, QUESTION, check

agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY)), instructions="Be brief.")
pictures = {"bytes": BinaryContent(FILE, media_type="image/png"), "url": ImageUrl(IMAGES["url"])}
for form, picture in pictures.items():
    first = agent.run_sync([QUESTION, picture])
    check(form, first.output)
    second = agent.run_sync([QUESTION, picture], message_history=first.all_messages())
    check(f"{form}, second turn", second.output)
    check(f"{form}, streamed", agent.run_stream_sync([QUESTION, picture]).get_output())
