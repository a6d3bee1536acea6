"""OpenAI's Agents SDK, which speaks the Responses API unless told otherwise."""

from agents import Agent, AsyncOpenAI, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from pydantic import BaseModel
from scene import BASE_URL, IMAGES, KEY, MODEL, QUESTION, check, held

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY)
seen = [
    {"type": "input_image", "image_url": IMAGES["data"], "detail": "auto"},
    {"type": "input_text", "text": QUESTION},
]
asked = [{"role": "user", "content": seen}]


class Shape(BaseModel):
    kind: str
    sides: int


for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    model = kind(model=MODEL, openai_client=client)
    agent = Agent(name="looker", instructions="Be brief.", model=model)
    check(kind.__name__, Runner.run_sync(agent, asked).final_output)
    typed = Agent(name="typed", model=model, output_type=Shape)
    held(f"{kind.__name__}, output_type", Runner.run_sync(typed, asked).final_output, Shape)
