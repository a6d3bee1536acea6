"""Pydantic AI."""

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from scene import BASE_URL, FILE, IMAGES, KEY, MODEL, QUESTION, check, held

agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY)), instructions="Be brief.")
images = {"bytes": BinaryContent(FILE, media_type="image/png"), "url": ImageUrl(IMAGES["url"])}
for form, image in images.items():
    first = agent.run_sync([QUESTION, image])
    check(form, first.output)
    second = agent.run_sync([QUESTION, image], message_history=first.all_messages())
    check(f"{form}, second turn", second.output)
    check(f"{form}, streamed", agent.run_stream_sync([QUESTION, image]).get_output())


class Shape(BaseModel):
    kind: str
    sides: int


provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    for wanted in (Shape, ToolOutput(Shape), NativeOutput(Shape)):
        agent = Agent(kind(MODEL, provider=provider), output_type=wanted)
        held(f"{kind.__name__}, {type(wanted).__name__}", agent.run_sync([QUESTION, images["bytes"]]).output, Shape)
