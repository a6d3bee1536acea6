"""AutoGen: the model's client, and an agent."""

import asyncio
import io

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import MultiModalMessage
from autogen_core import Image
from autogen_core.models import AssistantMessage, SystemMessage, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from PIL import Image as Pillow
from scene import BASE_URL, FILE, KEY, MODEL, QUESTION, check


async def main() -> None:
    info = {"vision": True, "function_calling": False, "json_output": False, "structured_output": False}
    client = OpenAIChatCompletionClient(
        model=MODEL, base_url=BASE_URL, api_key=KEY, model_info={**info, "family": "unknown"}
    )
    image = Image.from_pil(Pillow.open(io.BytesIO(FILE)))
    asked = UserMessage(content=[QUESTION, image], source="user")
    said = (await client.create([asked])).content
    check("create", said)
    turns = [SystemMessage(content="Be brief."), asked, AssistantMessage(content=said, source="helper"), asked]
    check("second turn", (await client.create(turns)).content)
    check("streamed", [item async for item in client.create_stream([asked])][-1].content)
    agent = AssistantAgent("looker", client, system_message=None)
    result = await agent.run(task=MultiModalMessage(content=[QUESTION, image], source="user"))
    check("agent", result.messages[-1].content)
    await client.close()


asyncio.run(main())
